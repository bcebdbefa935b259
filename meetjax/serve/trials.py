"""One prompt at several strengths: what the page compares and draws. All strengths are asked at once and share the engine's batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import apply
from meetjax.models.load import Model
from meetjax.serve.stream import Ask, Piece, QueueFull, Stream
from meetjax.types import Array, Params

BUCKET = 64
"""Texts are padded to multiples of this many tokens before they are scored, so that few programs are compiled."""


@dataclasses.dataclass
class Trial:
    """An answer at one strength, so far. logp: log-probability of its tokens under what made them, in nats; error: why there is none."""

    strength: float
    text: str = ""
    ids: tuple[int, ...] = ()
    logp: float = 0.0
    finish: str | None = None
    error: str | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.ids += () if piece.token is None else (piece.token,)
        self.logp += piece.logprob or 0.0
        self.finish = piece.finish


def along(ask: Ask, name: str, strengths: Sequence[float]) -> list[Ask]:
    """The same ask with one adapter at each strength, the others as they are, with log-probabilities."""
    return [dataclasses.replace(ask, adapters={**ask.adapters, name: strength}, logprobs=1) for strength in strengths]


def run(engine: Any, asks: Sequence[Ask], strengths: Sequence[float]) -> Iterator[list[Trial]]:
    """All asks at once; yields the trials whenever one has grown. What the engine refuses is told in its trial.

    An iterator that is closed early gives its answers up.
    """
    trials, streams = [Trial(strength) for strength in strengths], []
    for trial, ask in zip(trials, asks, strict=True):
        try:
            streams.append(engine.submit(ask))
        except (MeetjaxError, QueueFull) as error:
            trial.error = str(error)
            streams.append(None)
    try:
        yield trials
        open_ones = [(trial, stream) for trial, stream in zip(trials, streams, strict=True) if stream is not None]
        while open_ones:
            for trial, stream in open_ones:  # one piece of each in turn: they are made together
                piece = next(stream)
                trial.take(piece)
                if piece.finish in ("error", "cancelled"):
                    trial.error = stream.error or "the server ended it"
            open_ones = [(trial, stream) for trial, stream in open_ones if trial.finish is None]
            yield trials
    finally:
        give_up(streams)


def give_up(streams: Sequence[Stream | None]) -> None:
    """Cancels what is not finished."""
    for stream in streams:
        if stream is not None and not stream.finished:
            stream.cancel()


def log_ratio(model: Model, prompt: Sequence[int], trial: Trial) -> float:
    """log p(answer | strength) - log p(answer | base), in nats: what DPO calls the reward, over beta (arXiv 2305.18290)."""
    ids = np.asarray([*prompt, *trial.ids], np.int32)
    tokens = np.zeros((1, -(-len(ids) // BUCKET) * BUCKET), np.int32)
    tokens[0, : len(ids)] = ids
    base = _answer_logp(model.config, model.params, tokens, np.int32(len(prompt)), np.int32(len(ids)))
    return trial.logp - float(base)


@partial(jax.jit, static_argnums=0)
def _answer_logp(
    config: ModelConfig, params: Params, tokens: Int[Array, "1 T"], begin: Int[Array, ""], end: Int[Array, ""]
) -> Float[Array, ""]:
    """Log-probability under the base of tokens[begin:end] after those before."""
    logps = jax.nn.log_softmax(apply(config, params, tokens)[0, :-1], axis=-1)
    chosen = jnp.take_along_axis(logps, tokens[0, 1:, None], axis=1)[:, 0]
    place = jnp.arange(1, tokens.shape[1])
    return jnp.sum(jnp.where((place >= begin) & (place < end), chosen, 0.0))
