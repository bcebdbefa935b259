"""From prompts to tokens: a compiled prefill, then one compiled step, its cache reused, until every row has ended."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from meetjax.generate.sampling import RowSampling, sample
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import Cache, decode_step, prefill
from meetjax.models.layers import logits
from meetjax.types import Array, Params

LOOK_EVERY = 8
"""Steps between two looks at whether all rows are done: a look waits for the device, a step does not."""


class _Going(NamedTuple):
    """Where a batch stands. out: int32[B, N]; count: int32[B], tokens that count; last: int32[B]; step: int32[]."""

    out: Int[Array, "B N"]
    count: Int[Array, " B"]
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    cache: Cache


class Asked(NamedTuple):
    """What the rows want, the same at every step."""

    rows: RowSampling
    adapters: Any
    gates: Float[Array, "B A"] | None
    dial: Float[Array, " B"] | None
    limit: Int[Array, " B"]


def generate_tokens(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rows: RowSampling,
    adapters: Any = None,
    gates: Float[Array, "B A"] | None = None,
    dial: Float[Array, " B"] | None = None,
    limit: Int[Array, " B"] | None = None,
    *,
    max_new_tokens: int,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """(new tokens [B, max_new_tokens], how many of them count, EOS included) for right-padded prompts of `lengths` tokens; params
    unstacked.

    limit: int32[B], tokens a row may have at most (None: max_new_tokens). The loop is Python's: inside a compiled loop the same
    step took up to 2.5 times longer on CPU, and a server has to look in between anyway.
    """
    most = jnp.full(tokens.shape[0], max_new_tokens, jnp.int32) if limit is None else limit
    asked = Asked(rows, adapters, gates, dial, most)
    going = first_token(config, params, tokens, lengths, asked, max_new_tokens)
    for step in range(1, max_new_tokens):
        if step % LOOK_EVERY == 0 and bool(jnp.all(going.done)):
            break
        going = next_token(config, params, going, asked)
    return going.out, going.count


@partial(jax.jit, static_argnums=(0, 5))
def first_token(config: ModelConfig, params: Params, tokens: Array, lengths: Array, asked: Asked, max_new_tokens: int) -> _Going:
    """Prefill and the first token."""
    batch, width = tokens.shape
    hidden, cache = prefill(config, params, tokens, lengths, width + max_new_tokens, asked.adapters, asked.gates, asked.dial)
    first = sample(logits(params, hidden), asked.rows, jnp.int32(0))
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)
    done = jnp.isin(first, _stop(config)) | (asked.limit <= 1)
    return _Going(out, jnp.ones(batch, jnp.int32), first, done, jnp.int32(1), cache)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_token(config: ModelConfig, params: Params, going: _Going, asked: Asked) -> _Going:
    """One more token of every row that is not done; a row that is gets zeros, which do not count."""
    hidden, cache = decode_step(config, params, going.last, going.cache, asked.adapters, asked.gates, asked.dial)
    new = jnp.where(going.done, 0, sample(logits(params, hidden), asked.rows, going.step))
    out = jax.lax.dynamic_update_slice_in_dim(going.out, new[:, None], going.step, axis=1)
    count = going.count + (~going.done).astype(jnp.int32)
    done = going.done | jnp.isin(new, _stop(config)) | (count >= asked.limit)
    return _Going(out, count, new, done, going.step + 1, cache)


def _stop(config: ModelConfig) -> Int[Array, " N"]:
    return jnp.asarray(config.eos_token_ids or (-1,), jnp.int32)
