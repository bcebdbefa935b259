"""What a client may ask over HTTP: OpenAI's chat completions and completions, and three fields of our own.

Our own: `adapters` (name -> strength), `logit_dial`, `top_k`. A field of OpenAI's that would change the answer and is not served is
refused unless it has its neutral value; one that would not is ignored; an unknown one is refused.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meetjax.generate.sampling import Sampling
from meetjax.serve.stream import MOST_LOGPROBS, Ask

MOST_STRENGTH = 10.0
"""Of an adapter or the logit dial, either way: what is beyond is a mistake, not a wish."""
MOST_ANSWERS = 16
"""Answers to one request, over all its prompts."""
SEEDS = 2**31

REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
"""Fields that are not served -> the values that ask for nothing."""
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls")
)


class Refusal(Exception):
    """A request that is not answered: an HTTP status and OpenAI's error body. retry_after: seconds."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


Strength = Annotated[float, Field(ge=-MOST_STRENGTH, le=MOST_STRENGTH, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Strict(BaseModel):
    """No field beyond those named, no value of another type: "0.7" is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn. What a client copies from an answer of ours and is null there is left out."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: own for name, own in value.items() if own is not None} if isinstance(value, dict) else value

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Wish(_Strict):
    """What both endpoints take."""

    model: str = Field(description="base, or base+ADAPTER@STRENGTH+ADAPTER@STRENGTH; without @ the strength is 1")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapters: dict[str, Strength] | None = Field(None, description="strength of each adapter: 0 none of it, 1 as trained")
    logit_dial: Strength | None = Field(None, description="d in z = d z_adapted + (1 - d) z_base")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in REFUSED.items():
            if name in body and body[name] not in neutral:
                raise Refusal(400, f"{name} is not served here; leave it out", param=name, code="unsupported_parameter")
        return {name: value for name, value in body.items() if name not in REFUSED and name not in IGNORED}

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Wish):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are wanted beside the chosen one; None: no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Wish):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One item an answer, texts or tokens."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt  # type: ignore[return-value]


_PART = re.compile(r"(?P<name>[^@+]+)(?:@(?P<strength>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?")


def read_model(name: str, served: str, adapters: Collection[str]) -> dict[str, float]:
    """Strengths in a model's name: `base+concise@0.5+harmless@-1`, with `served` for base too; an adapter's name alone is strength 1.

    Raises Refusal 404 for a name that is none of these and 400 for a strength that is none.
    """
    if name in adapters:
        return {name: 1.0}
    rest = next((name[len(base) :] for base in (served, "base") if name == base or name.startswith(f"{base}+")), None)
    if rest is None:
        raise _no_such_model(name, adapters)
    strengths: dict[str, float] = {}
    while rest:
        part = _PART.match(rest, 1) if rest[0] == "+" else None
        if part is None or part["name"] not in adapters:
            raise _no_such_model(name, adapters)
        strength = 1.0 if part["strength"] is None else float(part["strength"])
        if not abs(strength) <= MOST_STRENGTH:
            raise Refusal(400, f"model: strength of {part['name']}; expected -10 to 10; found {part['strength'][:40]}", param="model")
        if part["name"] in strengths:
            raise Refusal(400, f"model: {part['name']} is named twice", param="model")
        strengths[part["name"]] = strength
        rest = rest[part.end() :]
    return strengths


def _no_such_model(name: str, adapters: Collection[str]) -> Refusal:
    known = ", ".join(sorted(adapters)) or "none"
    message = f"no model {name[:80]!r}; expected base or base+ADAPTER@STRENGTH; adapters loaded: {known}"
    return Refusal(404, message, param="model", code="model_not_found")


def mixture(request: _Wish, served: str, adapters: Collection[str]) -> dict[str, float]:
    """Strength of every adapter that a request names, in its model or in `adapters`. Raises Refusal for unknown or doubled names."""
    strengths = read_model(request.model, served, adapters)
    for name, strength in (request.adapters or {}).items():
        if name not in adapters:
            known = ", ".join(sorted(adapters)) or "none"
            raise Refusal(400, f"no adapter {name[:80]!r}; adapters loaded: {known}", param="adapters", code="adapter_not_found")
        if name in strengths:
            raise Refusal(400, f"{name} has a strength in the model's name and in adapters; give one", param="adapters")
        strengths[name] = strength
    return strengths


def make_asks(request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], strengths: Mapping[str, float], capacity: int):
    """The asks of a request, n for each prompt in order. prompts: tokens; capacity: of prompt and answer, in tokens.

    A chat without a limit may fill what the prompt leaves. Answer i of a prompt draws from a seed that follows from the request's.
    Raises Refusal for what is too much.
    """
    count = request.n or 1
    if count * len(prompts) > MOST_ANSWERS:
        raise Refusal(400, f"n: expected at most {MOST_ANSWERS} answers a request; found {count} x {len(prompts)}", param="n")
    seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
    temperature, top_p = (1.0 if value is None else value for value in (request.temperature, request.top_p))
    likeliest, stop = request.likeliest, request.stop or ()
    made = Ask(
        ids=(),
        adapters=dict(strengths),
        dial=request.logit_dial,
        sampling=Sampling(temperature, request.top_k or 0, top_p),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=0 if likeliest is None else max(likeliest, 1),
    )
    asks = []
    for ids in prompts:
        limit = request.limit or max(capacity - len(ids), 1)
        if len(ids) + limit > capacity:
            message = f"prompt: too long; expected prompt + max_tokens <= {capacity} tokens; found {len(ids)} + {limit}"
            raise Refusal(400, message, param="messages" if isinstance(request, ChatRequest) else "prompt", code="context_length_exceeded")
        for i in range(count):  # far apart, so that the answers to seed s and s + 1 share nothing
            own = (seed + 0x1E3779B1 * i) % SEEDS
            asks.append(dataclasses.replace(made, ids=tuple(ids), max_new_tokens=limit, seed=own))
    return asks
