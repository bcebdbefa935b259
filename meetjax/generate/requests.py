"""A list of requests becomes one padded batch, and its tokens become texts; one request alone may be streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from meetjax.adapters.tree import Bank, check_gates, columns
from meetjax.data.records import Message, Prompt
from meetjax.data.template import render_prompt
from meetjax.data.tokenize import added_bos
from meetjax.errors import MeetjaxError
from meetjax.generate import decode
from meetjax.generate.sampling import RowSampling, Sampling
from meetjax.models.decoder import unstack, unstack_bank

Template = Literal["auto", "chat", "none"]
TOKENS = 32768
"""Of a batch at most, prompts and answers together: keys and values of so many are 1.5 GB for a model of 135M in float32."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt: text (a user message where the tokenizer has a chat template) or messages.

    gates: share of each bank column (None: 1 each); dial: logit dial d, z = d z_adapted + (1 - d) z_base (None: off); marker: text
    between prompt and answer.
    """

    prompt: str | tuple[Message, ...]
    system: str | None = None
    gates: tuple[float, ...] | None = None
    dial: float | None = None
    sampling: Sampling = Sampling()
    seed: int = 0
    marker: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """text without EOS; tokens counts the new ones, EOS included; ended says whether EOS came before the limit.

    ids: the new tokens; prompt: the tokens that they continue.
    """

    text: str
    tokens: int
    ended: bool
    ids: tuple[int, ...]
    prompt: tuple[int, ...]


def generate_texts(
    model: Any,
    requests: Sequence[Request],
    *,
    adapters: Bank | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    template: Template = "auto",
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answers in the order of the requests. model: `meetjax.load`'s; longest prompts are run first, `batch_size` rows at a time
    or, where these are long, a half, a quarter and so on.

    Raises MeetjaxError for gates of another shape, a negative gate of a soft prompt, or a prompt beyond the model's positions.
    """
    if batch_size < 1:
        raise MeetjaxError("batch_size", expected=">= 1", found=batch_size)
    params = unstack(model.params) if "blocks" in model.params else model.params
    bank = unstack_bank(adapters)
    encoded = [encode(model, request, template, max_new_tokens) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (-len(encoded[i]), i))
    results: list[Completion | None] = [None] * len(requests)
    left = order
    while left:
        size = min(_rows_at_once(len(encoded[left[0]]) + max_new_tokens, batch_size), len(order))
        chosen, left = left[:size], left[size:]
        # A short last batch is filled with copies of its first row, so that it needs no program of its own.
        rows = chosen + [chosen[0]] * (size - len(chosen))
        tokens, counts = _run(model, params, [requests[i] for i in rows], [encoded[i] for i in rows], bank, max_new_tokens)
        for i, ids, count in zip(chosen, tokens, counts, strict=False):
            ids = tuple(int(token) for token in ids[:count])
            ended = ids[-1] in model.config.eos_token_ids
            text = model.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
            results[i] = Completion(text, len(ids), ended, ids, tuple(encoded[i]))
        if progress is not None:
            progress(len(chosen))
    return [result for result in results if result is not None]


def _rows_at_once(tokens: int, batch_size: int) -> int:
    """Rows of so many tokens each: halved until they are `TOKENS` at most."""
    while batch_size > 1 and batch_size * tokens > TOKENS:
        batch_size //= 2
    return batch_size


def encode_prompt(tokenizer: Any, prompt: Prompt, template: Template = "auto", marker: str = "") -> list[int]:
    """The tokens before an answer: the rendered prompt and the marker, behind BOS where the tokenizer adds one.

    A blank at the end of a marker is part of the answer's first token, as it is in training, so it is left for the model to say.
    Raises MeetjaxError where there is no token, or no chat template for a conversation.
    """
    ids = list(tokenizer(render_prompt(tokenizer, prompt, template) + marker.rstrip(" "), add_special_tokens=False)["input_ids"])
    bos = added_bos(tokenizer)
    if bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    if not ids:
        raise MeetjaxError("prompt: no token", expected="some text", found=repr(prompt)[:60])
    return ids


def encode(model: Any, request: Request, template: Template, max_new_tokens: int) -> list[int]:
    """The tokens that a request's answer continues. Raises MeetjaxError for none, or for more than leave room for the answer."""
    if max_new_tokens < 1:
        raise MeetjaxError("max_new_tokens", expected=">= 1", found=max_new_tokens)
    if not 0 <= request.seed < 2**31:
        raise MeetjaxError("sampling: seed", expected="0 to 2^31 - 1", found=request.seed)
    prompt = request.prompt
    if request.system is not None:
        turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        prompt = (Message("system", request.system), *turns)
    ids = encode_prompt(model.tokenizer, prompt, template, request.marker)
    if len(ids) + max_new_tokens > model.config.max_position:
        raise MeetjaxError(
            "prompt: too long",
            expected=f"prompt + max_new_tokens <= {model.config.max_position} tokens",
            found=f"{len(ids)} + {max_new_tokens}",
            fix="shorten the prompt or ask for fewer new tokens",
        )
    return ids


def stream_text(
    model: Any, params: Any, request: Request, *, adapters: Bank | None = None, max_new_tokens: int = 256, template: Template = "auto"
) -> Iterator[str]:
    """The pieces of one answer as they become certain, never half a character. params: the model's, unstacked; adapters: best so too.

    A conversation grows: prompt lengths are rounded up to powers of 2, so that a long one meets few programs. Raises as
    `generate_texts` does, before the first piece.
    """
    ids = encode(model, request, template, max_new_tokens)
    width = max(2 * decode.BUCKET, 1 << (len(ids) - 1).bit_length())
    tokens, lengths, rows, gates, dial = _as_batch([request], [ids], adapters, width)
    asked = decode.Asked(rows, adapters, gates, dial, jnp.full(1, max_new_tokens, jnp.int32))
    going = decode.first_token(model.config, params, tokens, lengths, asked, max_new_tokens)
    new: list[int] = []
    told = ""
    while True:
        new.append(int(going.last[0]))
        ended = new[-1] in model.config.eos_token_ids
        text = model.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False)
        last = ended or len(new) == max_new_tokens
        if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(told) :]
            told = text
        if last:
            return
        going = decode.next_token(model.config, params, going, asked)


def _run(
    model: Any, params: Any, requests: Sequence[Request], encoded: Sequence[list[int]], adapters: Bank | None, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    width = decode.rounded(max(len(ids) for ids in encoded))
    tokens, lengths, rows, gates, dial = _as_batch(requests, encoded, adapters, width)
    out, counts = decode.generate_tokens(model.config, params, tokens, lengths, rows, adapters, gates, dial, max_new_tokens=max_new_tokens)
    return np.asarray(out), np.asarray(counts)


def _as_batch(requests: Sequence[Request], encoded: Sequence[list[int]], adapters: Bank | None, width: int) -> tuple[Any, ...]:
    """(tokens, lengths, sampling, gates or None, dial or None) of a batch, right-padded to `width` tokens."""
    tokens = np.zeros((len(encoded), width), np.int32)
    lengths = np.asarray([len(ids) for ids in encoded], np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    gates = None
    if any(request.gates is not None for request in requests):
        given = [(1.0,) * (columns(adapters) if adapters else 0) if request.gates is None else request.gates for request in requests]
        for own in given:  # before they become one array, which rows of unequal length cannot
            check_gates(adapters, np.asarray([own], np.float32), 1)
        gates = np.asarray(given, np.float32)
    dial = None
    if any(request.dial is not None for request in requests):
        dial = np.asarray([1.0 if request.dial is None else request.dial for request in requests], np.float32)
        if not np.isfinite(dial).all():
            raise MeetjaxError("dial: value", expected="finite numbers", found=dial.tolist())
    settings = [request.sampling for request in requests]
    rows = RowSampling(
        jnp.asarray([s.temperature for s in settings], jnp.float32),
        jnp.asarray([s.top_k for s in settings], jnp.int32),
        jnp.asarray([s.top_p for s in settings], jnp.float32),
        jnp.asarray([request.seed for request in requests], jnp.int32),
    )
    return tokens, lengths, rows, gates, dial
