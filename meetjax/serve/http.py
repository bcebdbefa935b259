"""The engine over HTTP: OpenAI's chat completions and completions, whole or streamed, /v1/models, /health and /metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from meetjax.data.records import Message
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import encode_prompt
from meetjax.models.load import Model
from meetjax.serve.guard import BODY, PATIENCE, Guard, log
from meetjax.serve.metrics import Metrics
from meetjax.serve.replies import Answer, Replies, error_body, error_headers, models
from meetjax.serve.schema import ChatRequest, CompletionRequest, Refusal, make_asks, mixture
from meetjax.serve.stream import QueueFull, Stream

AHEAD = 16
"""Chunks that a streamed reply may be ahead of what its client has taken."""


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refused request gets."""

    error: ErrorFacts


def make_app(engine: Any, model: Model, *, key: str | None = None, body: int = BODY, patience: float = PATIENCE) -> FastAPI:
    """The app. engine: an Engine, or what has its interface; model: the one it runs; key: that clients must give (None: none).

    body: bytes of a request's body at most; patience: seconds to wait for a client.
    """
    app = FastAPI(title="meetjax", version=version("meetjax"), docs_url=None, redoc_url=None)
    metrics = Metrics(engine.stats)
    service = _Service(engine, model)
    app.add_middleware(Guard, metrics=metrics, key=key, body=body, patience=patience)
    for kind, read in (
        (Refusal, lambda error: error),
        (MeetjaxError, lambda error: service.closed() if engine.refusing else Refusal(400, str(error))),
        (RequestValidationError, _invalid),
        (HTTPException, lambda error: Refusal(error.status_code, str(error.detail))),
    ):
        app.add_exception_handler(kind, partial(_refuse, read))
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    streamed = {"200": {"content": {"text/event-stream": {}}, "description": "the answer, or its chunks where stream is true"}}

    @app.post("/v1/chat/completions", responses=errors | streamed)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        messages = tuple(Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in body.messages)
        return await service.answer(request, body, [messages])

    @app.post("/v1/completions", responses=errors | streamed)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await service.answer(request, body, body.prompts)

    @app.get("/v1/models", responses=errors)
    async def list_models() -> dict[str, Any]:
        return service.models()

    @app.get("/health", responses=errors)
    async def health() -> dict[str, Any]:
        service.check_open()
        return {"status": "ok", "model": model.name, "adapters": sorted(engine.adapters)}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nowhere(request: Request) -> None:  # the page is mounted behind: it would answer these in its own way
        known = request.url.path in {getattr(route, "path", None) for route in app.routes}
        raise Refusal(405 if known else 404, f"{request.method} {request.url.path[:80]}: no such route")

    return app


async def _refuse(read: Callable[[Any], Refusal], request: Request, error: Exception) -> JSONResponse:
    refusal = read(error)
    request.state.facts["error"] = refusal.message[:200]
    return JSONResponse(error_body(refusal), refusal.status, error_headers(refusal))


def _invalid(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refusal(400, f"body: broken JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"unrecognized field {ascii(param)[:80]}", param=ascii(param)[1:81], code="unknown_parameter")
    return Refusal(
        400,
        f"{ascii(param or 'body')[1:-1][:80]}: {first['msg']}; found {ascii(first.get('input'))[:80]}",
        param=where[0] if where else None,
    )


class _Service:
    """What the routes share: one engine, one model, and a thread that tokenises so that the loop need not."""

    def __init__(self, engine: Any, model: Model):
        self.engine, self.model, self.created = engine, model, int(time.time())
        self.tokenizing = ThreadPoolExecutor(1, "tokenize")

    def models(self) -> dict[str, Any]:
        adapters = [(name, info.kinds, info.parameters) for name, info in sorted(self.engine.adapters.items())]
        return models(self.model.name, adapters, self.created)

    def closed(self) -> Refusal:
        return Refusal(503, self.engine.refusing, code="shutting_down", retry_after=5)

    def check_open(self) -> None:
        if self.engine.refusing:
            raise self.closed()

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest, prompts: Sequence[Any]) -> Response:
        """The reply to a request, whole or streamed."""
        self.check_open()
        began, facts = time.monotonic(), request.state.facts
        strengths = mixture(body, self.model.name, self.engine.adapters)
        loop = asyncio.get_running_loop()
        ids = [await loop.run_in_executor(self.tokenizing, self._encode, prompt) for prompt in prompts]
        asks = make_asks(body, ids, strengths, self.engine.capacity)
        streams: list[Stream] = request.state.held  # what is in this list is cancelled when the request ends, however it ends
        try:
            for ask in asks:
                streams.append(self.engine.submit(ask))
        except QueueFull as full:
            raise Refusal(429, str(full), code="queue_full", retry_after=full.retry_after) from None
        decode = partial(self.model.tokenizer.decode, skip_special_tokens=False)
        replies = Replies(body, facts["request_id"], self.model.fingerprint, lambda token: decode([token]), self.model.config.eos_token_ids)
        facts |= {"adapters": strengths, "dial": body.logit_dial, "stream": bool(body.stream)}
        watch = partial(_watch, streams, facts, began)
        if body.stream:
            events = _events(replies, streams, watch, facts)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        answers = await asyncio.gather(*(_whole(replies, stream, watch) for stream in streams))
        return JSONResponse(replies.whole(answers, streams))

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list):
            vocab = self.model.config.vocab
            if max(prompt) >= vocab:
                raise Refusal(400, f"prompt: token; expected below {vocab}; found {max(prompt)}", param="prompt")
            return prompt
        return encode_prompt(self.model.tokenizer, prompt, "none" if isinstance(prompt, str) else "chat")


def _watch(streams: Sequence[Stream], facts: dict[str, Any], began: float) -> None:
    """Keeps the facts of a request up to date, for its log line and the counts."""
    facts.setdefault("first_token_seconds", round(time.monotonic() - began, 4))
    facts["prompt_tokens"] = sum(stream.prompt_tokens for stream in streams)
    facts["completion_tokens"] = sum(stream.new_tokens for stream in streams)


def _check_piece(stream: Stream, finish: str | None) -> None:
    if finish in ("error", "cancelled"):
        reason = stream.error or "the server ended it"
        raise Refusal(503, f"the answer could not be finished: {reason}", code="answer_failed", retry_after=5)


async def _whole(replies: Replies, stream: Stream, watch: Callable[[], None]) -> Answer:
    answer = Answer()
    async for piece in stream:
        _check_piece(stream, piece.finish)
        replies.take(answer, piece)
        watch()
    return answer


async def _events(replies: Replies, streams: Sequence[Stream], watch: Callable[[], None], facts: dict[str, Any]) -> AsyncIterator[bytes]:
    """The chunks of all answers as server-sent events, each answer's in order, then [DONE]; or an error, which ends them.

    The answers are read no further than AHEAD chunks before what the client has taken.
    """
    ready: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(AHEAD)

    async def read(index: int, stream: Stream) -> None:
        answer = Answer()
        await ready.put(replies.opening(index))
        async for piece in stream:
            _check_piece(stream, piece.finish)
            new = replies.take(answer, piece)
            watch()
            await ready.put(replies.chunk(index, new))

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(streams):
                    group.create_task(read(index, stream))
        except* Refusal as refusals:
            first: Any = refusals.exceptions[0]
            await ready.put(error_body(first))
        except* Exception:
            log.exception("a stream failed")
            await ready.put(error_body(Refusal(500, "the server failed; its log says why", code="internal_error")))
        else:
            if replies.request.usage_wanted:
                await ready.put(replies.closing(streams))
            await ready.put({})

    reading = asyncio.ensure_future(read_all())
    try:
        while (body := await ready.get()) != {}:
            if body is None:
                continue
            yield b"data: " + json.dumps(body).encode() + b"\n\n"
            if "error" in body:
                facts["error"] = body["error"]["message"]
                return
        yield b"data: [DONE]\n\n"
    finally:
        reading.cancel()
