"""From prompts to tokens: a compiled prefill, then one compiled step, its cache reused, until every row has ended."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from meetjax.generate.sampling import RowSampling, sample
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import Cache, decode_step, prefill
from meetjax.models.layers import logits
from meetjax.types import Array, Params

LOOK_EVERY = 8
"""Steps between two looks at whether all rows are done: a look waits for the device, a step does not."""
BUCKET = 32
"""Prompt lengths are rounded up to a multiple of this many tokens, so that few programs are compiled."""
WORTH, SHARE = 256, 0.25
"""Padded tokens, and their share of a group of prompts, from which on a cut of the group pays for one more program."""


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
    going = _begin(config, params, np.asarray(tokens), np.asarray(lengths), asked, max_new_tokens)
    for step in range(1, max_new_tokens):
        if step % LOOK_EVERY == 0 and bool(jnp.all(going.done)):
            break
        going = next_token(config, params, going, asked)
    return going.out, going.count


def _begin(config: ModelConfig, params: Params, tokens: np.ndarray, lengths: np.ndarray, asked: Asked, max_new_tokens: int) -> _Going:
    """`first_token` of all rows; prompts far shorter than the longest are run apart, so that they are not padded to its length."""
    groups = cut_by_length(lengths)
    if len(groups) == 1:
        return first_token(config, params, tokens, lengths, asked, max_new_tokens)
    parts = []
    for rows in groups:
        own = jax.tree.map(lambda leaf, rows=rows: leaf[rows], asked._replace(adapters=None))._replace(adapters=asked.adapters)
        width = min(rounded(int(lengths[rows].max())), tokens.shape[1])
        spare = tokens.shape[1] - width
        parts.append(first_token(config, params, tokens[rows, :width], lengths[rows], own, max_new_tokens, spare))
    return _joined(parts, np.argsort(np.concatenate(groups)))


def cut_by_length(lengths: Int[np.ndarray, " B"]) -> list[Int[np.ndarray, " R"]]:
    """Rows to run together, longest first. A group is cut in two while that leaves out `WORTH` padded tokens and `SHARE` of its own."""

    def cut(rows: np.ndarray) -> list[np.ndarray]:
        widths = rounded(lengths[rows])
        saved = (widths[0] - widths[1:]) * np.arange(len(rows) - 1, 0, -1)
        if not len(saved) or saved.max() < max(WORTH, SHARE * widths[0] * len(rows)):
            return [rows]
        first = int(saved.argmax()) + 1
        return cut(rows[:first]) + cut(rows[first:])

    return cut(np.argsort(-lengths, kind="stable"))


def rounded(length: Any) -> Any:
    """`length` tokens, an int or an array of them, rounded up to a multiple of `BUCKET`."""
    return -(-length // BUCKET) * BUCKET


@jax.jit
def _joined(parts: list[_Going], places: Int[Array, " B"]) -> _Going:
    """One batch of all groups' rows, row b being the `places[b]`-th of them; a leaf may have several streams for each row."""

    def join(*leaves: Array) -> Array:
        if leaves[0].ndim == 0:
            return leaves[0]
        whole = jnp.concatenate(leaves)
        return whole.reshape(len(places), -1, *whole.shape[1:])[places].reshape(whole.shape)

    return jax.tree.map(join, *parts)


@partial(jax.jit, static_argnums=(0, 5, 6))
def first_token(
    config: ModelConfig, params: Params, tokens: Array, lengths: Array, asked: Asked, max_new_tokens: int, spare: int = 0
) -> _Going:
    """Prefill and the first token. spare: cells for more tokens than the prompts' width and the new ones."""
    batch, width = tokens.shape
    capacity = width + spare + max_new_tokens
    hidden, cache = prefill(config, params, tokens, lengths, capacity, asked.adapters, asked.gates, asked.dial)
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
