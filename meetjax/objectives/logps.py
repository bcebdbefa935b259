"""Summed log-probabilities of answers, each behind its own prompt or all behind one."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.models.config import ModelConfig
from meetjax.models.decoder import hidden_states
from meetjax.models.layout import Rows, branched_rows, text_rows
from meetjax.objectives.head import token_logps
from meetjax.types import Array, Batch, Params


def answer_logps(config: ModelConfig, params: Params, adapters: Any, batch: Batch) -> Float[Array, "B C"]:
    """s(y) = sum_t m_t log pi(y_t | x, y_<t) in nats for each of the C answers to each prompt, EOS included."""
    scores, owner = answer_token_logps(config, params, adapters, batch)
    sums = [jnp.sum(jnp.where(owner == slot, scores, 0.0), axis=1) for slot in range(batch.starts.shape[1] // batch.tokens.shape[1])]
    return jnp.stack(sums, axis=1).reshape(batch.starts.shape)


def answer_token_logps(config: ModelConfig, params: Params, adapters: Any, batch: Batch) -> tuple[Float[Array, "BK T"], Int[Array, "BK T"]]:
    """(log pi(y_t | x, y_<t) of each answer token in nats, 0 elsewhere; which answer of its row it belongs to, -1 elsewhere)."""
    owner, source = answer_places(batch)
    hidden = answer_states(config, params, adapters, batch)
    return token_logps(params, hidden, source, batch.tokens.reshape(owner.shape), owner >= 0), owner


compiled_answer_logps = partial(jax.jit, static_argnums=0)(answer_logps)
"""`answer_logps` as one program for all who only score: references, held-out pairs, the self-test."""


def answer_states(config: ModelConfig, params: Params, adapters: Any, batch: Batch) -> Float[Array, "BK T D"]:
    """Normed hidden states of the batch's rows."""
    gates = None if batch.gates is None else jnp.repeat(batch.gates, batch.tokens.shape[1], axis=0)
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[2])
    return hidden_states(config, params, tokens, adapters, gates, rows=_rows(config, batch))


def _rows(config: ModelConfig, batch: Batch) -> Rows:
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[2])
    if batch.common is None:
        return text_rows(config, tokens)
    return branched_rows(config, tokens, jnp.repeat(batch.common, batch.tokens.shape[1]), batch.ends.reshape(tokens.shape[0], -1))


def answer_places(batch: Batch) -> tuple[Int[Array, "BK T"], Int[Array, "BK T"]]:
    """(owner, source) of each token: which answer of its row it belongs to (-1: prompt or padding), and where it is predicted.

    That is at the token before it; for the first token behind the common part, at the end of the common part.
    """
    prompts, per_prompt, width = batch.tokens.shape
    starts, ends = (places.reshape(prompts * per_prompt, -1) for places in (batch.starts, batch.ends))
    place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (prompts * per_prompt, width))
    owner, source = jnp.full_like(place, -1), jnp.maximum(place - 1, 0)
    for slot in range(starts.shape[1]):
        owner = jnp.where((place >= starts[:, slot, None]) & (place < ends[:, slot, None]), slot, owner)
        if slot and batch.common is not None:
            end_of_common = jnp.repeat(batch.common, per_prompt)[:, None] - 1
            source = jnp.where(place == ends[:, slot - 1, None], end_of_common, source)
    return owner, source
