"""What a client gets over HTTP: OpenAI's bodies, whole and in chunks, as plain dictionaries."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from meetjax.serve.schema import ChatRequest, CompletionRequest, Refusal
from meetjax.serve.stream import Piece, Stream

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


def error_body(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    # What a client sent may hold half of a surrogate pair, which no UTF-8 has.
    message = refusal.message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": refusal.param, "code": refusal.code}}


def error_headers(refusal: Refusal) -> dict[str, str]:
    headers = {"www-authenticate": 'Basic realm="meetjax"'} if refusal.status == 401 else {}
    return headers if refusal.retry_after is None else headers | {"retry-after": str(max(1, math.ceil(refusal.retry_after)))}


@dataclasses.dataclass
class Answer:
    """One answer so far: its text, and its log-probabilities as (token text, log-probability, likeliest)."""

    text: str = ""
    logprobs: list[tuple[str, float, list[tuple[str, float]]]] = dataclasses.field(default_factory=list)
    finish: str | None = None


class Replies:
    """The bodies of one request's reply. decode: text of one token; ends: tokens that end an answer, which have no text."""

    def __init__(
        self, request: ChatRequest | CompletionRequest, name: str, fingerprint: str, decode: Callable[[int], str], ends: Collection[int]
    ):
        self.request, self.decode, self.ends = request, decode, ends
        self.chat = isinstance(request, ChatRequest)
        self.likeliest = request.likeliest
        self.offsets: dict[int, int] = {}
        self.head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + name,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint[:12],
        }

    def take(self, answer: Answer, piece: Piece) -> Answer:
        """Adds a piece to an answer; returns what is new as an answer of its own."""
        new = Answer(piece.text, finish=piece.finish)
        if self.likeliest is not None and piece.token is not None and piece.logprob is not None and piece.token not in self.ends:
            top = [(self.decode(token), logprob) for token, logprob in piece.top[: self.likeliest]]
            new.logprobs.append((self.decode(piece.token), piece.logprob, top))
        answer.text += new.text
        answer.logprobs += new.logprobs
        answer.finish = new.finish
        return new

    def whole(self, answers: Sequence[Answer], streams: Sequence[Stream]) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        choices = []
        for i, answer in enumerate(answers):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": answer.text, "refusal": None}} if self.chat else {"text": answer.text}
            )
            choices.append({"index": i, **said, "logprobs": self._logprobs(i, answer), "finish_reason": answer.finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices, "usage": usage(streams, self.request.n or 1)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a chat's answer, which says who speaks."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None) if self.chat else None

    def chunk(self, index: int, new: Answer) -> dict[str, Any] | None:
        """The chunk of one piece; None where it says nothing."""
        if not (new.text or new.logprobs or new.finish):
            return None
        said: dict[str, Any] = {"delta": {"content": new.text} if new.text else {}} if self.chat else {"text": new.text}
        return self._chunk(index, said, self._logprobs(index, new), new.finish)

    def closing(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """The chunk behind the last, with the counts."""
        return self.head | {"object": self._kind, "choices": [], "usage": usage(streams, self.request.n or 1)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, said: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        body = self.head | {"object": self._kind, "choices": [{"index": index, **said, "logprobs": logprobs, "finish_reason": finish}]}
        return body | {"usage": None} if self.request.usage_wanted else body

    def _logprobs(self, index: int, answer: Answer) -> dict[str, Any] | None:
        if self.likeliest is None:
            return None
        if self.chat:
            content = [
                _entry(token, logprob) | {"top_logprobs": [_entry(*other) for other in top]} for token, logprob, top in answer.logprobs
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token, _, _ in answer.logprobs:
            offsets.append(self.offsets.get(index, 0))
            self.offsets[index] = offsets[-1] + len(token)
        return {
            "tokens": [token for token, _, _ in answer.logprobs],
            "token_logprobs": [logprob for _, logprob, _ in answer.logprobs],
            "top_logprobs": [dict(top) for _, _, top in answer.logprobs] if self.likeliest else None,
            "text_offset": offsets,
        }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    """bytes: None for a token that is a part of a character."""
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode("utf-8", "replace"))}


def usage(streams: Sequence[Stream], answers: int) -> dict[str, int]:
    """Tokens, EOS included; a prompt is counted once for all of its `answers`."""
    prompt, new = sum(s.prompt_tokens for s in streams[::answers]), sum(s.new_tokens for s in streams)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def models(served: str, adapters: Sequence[tuple[str, Sequence[str], int]], created: int) -> dict[str, Any]:
    """The body of /v1/models: the base, and base+NAME for every adapter (name, kinds, trained parameters)."""
    listed: list[dict[str, Any]] = [{"id": served, "object": "model", "created": created, "owned_by": "meetjax"}]
    for name, kinds, parameters in adapters:
        facts = {"parent": served, "root": name, "kinds": list(kinds), "parameters": parameters}
        listed.append({"id": f"base+{name}", "object": "model", "created": created, "owned_by": "meetjax", **facts})
    return {"object": "list", "data": listed}
