"""What the engine runs on the device: every program of a fixed shape, compiled once for each number of cells.

A batch has B rows. An answer takes one row, or several that get the same tokens and are mixed before the head: with and without
the adapters for a logit dial, and one for each identity block. So nobody pays for a dial that no one uses.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from meetjax.adapters.tree import Bank, Prompt
from meetjax.generate.sampling import RowSampling, sample
from meetjax.models.bits import write_slice
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import Cache, extend, prefill
from meetjax.models.layers import logits
from meetjax.models.layout import Cells
from meetjax.serve.stream import MOST_LOGPROBS
from meetjax.types import Array, Params


class Going(NamedTuple):
    """Where the batch stands. last: int32[B], the token that is run next; step: int32[B], tokens made."""

    cache: Cache
    last: Int[Array, " B"]
    step: Int[Array, " B"]


class Lanes(NamedTuple):
    """What the rows want, sent anew when one changes.

    active: rows that count; enters: the identity block of a row, or -1; parts, weights: rows that are mixed into this one and their
    weights, 0 for none; leader: the row whose token this one gets; reported: rows that want log-probabilities.
    """

    active: Bool[Array, " B"]
    gates: Float[Array, "B A"]
    enters: Int[Array, " B"]
    parts: Int[Array, "B M"]
    weights: Float[Array, "B M"]
    leader: Int[Array, " B"]
    sampling: RowSampling
    reported: Bool[Array, " B"]


class Made(NamedTuple):
    """A token a row; its log-probability and the likeliest where some row wants them, else 0; fine: whether logits were finite."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    top: Int[Array, "B 8"]
    top_logprobs: Float[Array, "B 8"]
    fine: Bool[Array, " B"]


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty(config: ModelConfig, bank_identity: tuple[str, ...], shape: tuple[int, int]) -> Cache:
    """A cache of (rows, cells), nothing in it; bank_identity: names of the identity blocks."""
    rows, cells = shape
    leaf = partial(jnp.zeros, (rows, config.kv_heads, cells, config.head_width), config.dtype)
    blocks = [(leaf(), leaf()) for _ in range(config.layers)]
    places = jnp.zeros((rows, cells), jnp.int32) + jnp.arange(cells, dtype=jnp.int32)[None] if config.sliding_window else None
    zeros = jnp.zeros(rows, jnp.int32)
    return Cache(blocks, {name: (leaf(), leaf()) for name in bank_identity}, Cells(zeros, zeros, jnp.zeros((rows, cells)), places))


def identity_names(bank: Bank) -> tuple[str, ...]:
    """Names of the caches of a bank's identity blocks, as `models.decoder` has them."""
    if bank.identity is None:
        return ()
    return tuple(f"{entry}.{n}" for entry in range(len(bank.identity.entries)) for n in range(bank.identity.block["q"].shape[0]))


def _resized(x: Array, axis: int, to: int) -> Array:
    have = x.shape[axis]
    if to <= have:
        return jax.lax.slice_in_dim(x, 0, to, axis=axis)
    return jnp.pad(x, [(0, to - have if i == axis else 0) for i in range(x.ndim)])


def _placed(cells: Cells) -> Cells:
    """With the places of the free cells: the text goes on behind the last one filled."""
    if cells.places is None:
        return cells
    cell = jnp.arange(cells.places.shape[1], dtype=jnp.int32)[None]
    ahead = cells.position[:, None] + cell - cells.filled[:, None]
    return dataclasses.replace(cells, places=jnp.where(cell < cells.filled[:, None], cells.places, ahead))


def _with_cells(cache: Cache, to: int) -> Cache:
    blocks, identity = jax.tree.map(lambda x: _resized(x, 2, to), (cache.blocks, cache.identity))
    places = None if cache.cells.places is None else _resized(cache.cells.places, 1, to)
    cells = dataclasses.replace(cache.cells, bias=_resized(cache.cells.bias, 1, to), places=places)
    return Cache(blocks, identity, _placed(cells))


resize = jax.jit(_with_cells, static_argnums=1)
"""The cache with more or fewer cells."""


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def run_chunk(
    config: ModelConfig, params: Params, bank: Bank, stage: Cache, tokens: Array, lengths: Array, gates: Array, enters: Array
) -> tuple[Array, Cache]:
    """The next `lengths` tokens of the prompt of a single row: (hidden state [1, D] of the last, the row's cache)."""
    return extend(config, params, tokens, stage, bank, gates, lengths=lengths, enters=enters)


@partial(jax.jit, static_argnums=(0, 1))
def begin_chunk(
    config: ModelConfig,
    capacity: int,
    params: Params,
    bank: Bank,
    vectors: Float[Array, "E P D"],
    chosen: Int[Array, " C"],
    strengths: Float[Array, "1 C"],
    tokens: Array,
    lengths: Array,
    gates: Array,
    enters: Array,
) -> tuple[Array, Cache]:
    """`run_chunk` for the first tokens behind soft prompts: those `chosen` of all `vectors`, at `strengths` (0: no prompt)."""
    first = gates.shape[1]
    prompt = Prompt(vectors[chosen], tuple(range(first, first + chosen.shape[0])))
    own = dataclasses.replace(bank, prompt=prompt)
    return prefill(config, params, tokens, lengths, capacity, own, jnp.concatenate([gates, strengths], axis=1), enters=enters)


def _mixed(hidden: Float[Array, "B D"], parts: Int[Array, "R M"], weights: Float[Array, "R M"]) -> Float[Array, "R D"]:
    """sum_m w_m h_m in float32, as `streams.mix`; what has weight 0 is not looked at, so a row is never harmed by another."""
    chosen = hidden[parts].astype(jnp.float32)
    terms = jnp.where(weights[:, :, None] != 0, weights[:, :, None] * chosen, 0.0)
    total = terms[:, 0]
    for m in range(1, terms.shape[1]):
        total = total + terms[:, m]
    return total.astype(hidden.dtype)


def _made(params: Params, hidden: Float[Array, "R D"], sampling: RowSampling, step: Int[Array, " R"], reported: Bool[Array, " R"]) -> Made:
    scores = logits(params, hidden)
    token = sample(scores, sampling, step)
    rows, most = scores.shape[0], min(MOST_LOGPROBS, scores.shape[1])

    def report() -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(scores, axis=-1)
        values, top = jax.lax.top_k(logprobs, most)
        return jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], top, values

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.zeros(rows), jnp.zeros((rows, most), jnp.int32), jnp.zeros((rows, most))

    logprob, top, values = jax.lax.cond(jnp.any(reported), report, nothing)
    return Made(token, logprob, top, values, jnp.isfinite(jnp.max(scores, axis=-1)) & jnp.isfinite(jnp.min(scores, axis=-1)))


@jax.jit
def first_token(params: Params, hidden: list[Array], weights: Float[Array, "1 M"], sampling: RowSampling, reported: Array) -> Made:
    """The token behind a prompt; hidden: of each of its rows, [1, D], as many as `weights`."""
    parts = jnp.arange(len(hidden), dtype=jnp.int32)[None]
    return _made(params, _mixed(jnp.concatenate(hidden), parts, weights), sampling, jnp.zeros(1, jnp.int32), reported)


@partial(jax.jit, donate_argnums=0)
def insert(going: Going, stage: Cache, row: Int[Array, ""], token: Int[Array, " 1"]) -> Going:
    """Overwrites all cells of a row of the batch with those of a prefilled row, so that nothing of who was there before is left."""
    stage = _with_cells(stage, going.cache.cells.bias.shape[1])
    cache = jax.tree.map(lambda old, new: write_slice(old, new, row, axis=0), going.cache, stage)
    last = jax.lax.dynamic_update_slice_in_dim(going.last, token, row, axis=0)
    step = jax.lax.dynamic_update_slice_in_dim(going.step, jnp.ones(1, jnp.int32), row, axis=0)
    return Going(cache, last, step)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(config: ModelConfig, params: Params, bank: Bank, going: Going, lanes: Lanes) -> tuple[Going, Made]:
    """One more token of every active row; the others stand still."""
    count = lanes.active.astype(jnp.int32)
    hidden, cache = extend(config, params, going.last[:, None], going.cache, bank, lanes.gates, lengths=count, enters=lanes.enters)
    made = _made(params, _mixed(hidden, lanes.parts, lanes.weights), lanes.sampling, going.step, lanes.reported)
    return Going(cache, made.token[lanes.leader], going.step + count), made


class Block(NamedTuple):
    """Some cells of a single row: keys and values [N, K, cells, H] of all layers, and what `Cells` says of them."""

    pairs: Float[Array, "N K c H"]
    bias: Float[Array, " c"]
    places: Int[Array, " c"] | None
    filled: Int[Array, " 1"]
    position: Int[Array, " 1"]


@partial(jax.jit, static_argnums=2)
def cut(stage: Cache, start: Int[Array, ""], size: int) -> Block:
    """A copy of `size` cells, of which the last is the row's last filled one."""
    pairs = [jax.lax.dynamic_slice_in_dim(x[0], start, size, axis=1) for x in jax.tree.leaves((stage.blocks, stage.identity))]
    bias, places = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x[0], start, size), (stage.cells.bias, stage.cells.places))
    return Block(jnp.stack(pairs), bias, places, stage.cells.filled, stage.cells.position)


@partial(jax.jit, donate_argnums=0)
def paste(stage: Cache, block: Block, start: Int[Array, ""]) -> Cache:
    """The row with the block's cells behind `start` others."""
    leaves, tree = jax.tree.flatten((stage.blocks, stage.identity))
    new = [write_slice(x, block.pairs[i][None], start, axis=2) for i, x in enumerate(leaves)]
    blocks, identity = jax.tree.unflatten(tree, new)
    old = (stage.cells.bias, stage.cells.places)
    bias, places = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y[None], start, axis=1), old, (block.bias, block.places)
    )
    cells = Cells(block.filled, block.position, bias, places)
    return Cache(blocks, identity, _placed(cells))
