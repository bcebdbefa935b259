"""Copies of each row that run side by side through one set of weights and are mixed before the head.

Two things need them: the identity block, whose dial mixes the logits with and without the block, and the logit dial d of any
bank, z = d z_adapted + (1 - d) z_base. Logits are linear in the normed hidden state, so mixing hidden states in float32 is
mixing logits, and the head runs once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.models.layers import Gates
from meetjax.types import Array


@dataclasses.dataclass(frozen=True)
class Streams:
    """gates: float32[B*S, A] or None (1 everywhere), rows laid out [B, S] so that a batch split over devices stays so;
    weights: float32[B, S] or None for one stream; blocks: per stream, which identity block it enters through, or None; enters:
    int32[B], the same for each row of a single stream, -1 for none.
    """

    gates: Float[Array, "BS A"] | None
    weights: Float[Array, "B S"] | None
    blocks: tuple[int | None, ...]
    enters: Int[Array, " B"] | None = None


def make_streams(bank: Any, gates: Float[Array, "B A"] | None, dial: Float[Array, " B"] | None, rows: int) -> Streams:
    """The streams that a bank, its gates and a logit dial ask for.

    Identity blocks: z = sum_e g_e z_e + (1 - sum_e g_e) z_plain (Zhu et al. 2025, arXiv 2503.04346, for several blocks). Dial:
    decoding-time realignment (Liu et al. 2024, arXiv 2402.02992).
    """
    entries = () if bank is None or bank.identity is None else bank.identity.entries
    if bank is None:
        return Streams(None, None, (None,))
    if dial is None and (not entries or (gates is None and len(entries) == 1)):
        return Streams(gates, None, (0 if entries else None,))
    present = [tree for tree in (bank.prompt, bank.lora, bank.edit, bank.identity, bank.reward) if tree is not None]
    full = jnp.ones((rows, 1 + max(max(tree.entries) for tree in present)), jnp.float32) if gates is None else gates
    full = full.astype(jnp.float32)
    own = [full[:, entry] for entry in entries]
    weights = [*own, 1 - sum(own)] if own else [jnp.ones(rows, jnp.float32)]
    blocks: list[int | None] = [*range(len(own)), None]
    stream_gates = [full] * len(weights)
    if dial is not None:
        weights = [dial * weight for weight in weights] + [1 - dial]
        blocks, stream_gates = [*blocks, None], [*stream_gates, jnp.zeros_like(full)]
    stacked = jnp.stack(stream_gates, axis=1)
    return Streams(stacked.reshape(-1, full.shape[1]), jnp.stack(weights, axis=1), tuple(blocks))


def repeat(x: Float[Array, "B ..."], streams: Streams) -> Float[Array, "BS ..."]:
    """One copy of each row a stream."""
    return jnp.repeat(x, len(streams.blocks), axis=0) if len(streams.blocks) > 1 else x


def fan_out(entered: dict[int | None, Float[Array, "B ..."]], streams: Streams) -> Float[Array, "BS ..."]:
    """Picks for each stream the rows that entered the way it wants."""
    if streams.enters is not None:
        return _picked(entered, streams.enters)
    if len(streams.blocks) == 1:
        return entered[streams.blocks[0]]
    stacked = jnp.stack([entered[block] for block in streams.blocks], axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _picked(entered: dict[int | None, Float[Array, "B ..."]], enters: Int[Array, " B"]) -> Float[Array, "B ..."]:
    h = entered[None]
    for block in [block for block in entered if block is not None]:
        h = jnp.where(jnp.expand_dims(enters == block, tuple(range(1, h.ndim))), entered[block], h)
    return h


def mix(h: Float[Array, "BS T D"], streams: Streams) -> Float[Array, "B T D"]:
    """sum_s w_s h_s in float32; a stream of weight 0 adds exactly nothing."""
    if streams.weights is None:
        return h
    parts = h.reshape(-1, len(streams.blocks), *h.shape[1:]).astype(jnp.float32)
    # Added one by one: a reduction would be fused into the head's product on CPU and computed anew for every tile of it.
    weighted = [streams.weights[:, s, None, None] * parts[:, s] for s in range(len(streams.blocks))]
    return functools.reduce(jnp.add, weighted).astype(h.dtype)


def kind_gates(bank: Any, kind: str, gates: Float[Array, "B A"] | None) -> Float[Array, "B E"] | None:
    """Gates of one kind's adapters ([1, E] when all rows are alike), LoRA's times alpha / rank; None where the bank lacks it."""
    tree = getattr(bank, kind, None)
    if tree is None:
        return None
    if gates is None:
        chosen = jnp.ones((1, len(tree.entries)), jnp.float32)
    else:
        chosen = jnp.stack([gates[:, entry] for entry in tree.entries], axis=1).astype(jnp.float32)
    return chosen * tree.scale if kind == "lora" else chosen


def block_gates(bank: Any, gates: Float[Array, "B A"] | None) -> Gates:
    """Gates of the kinds that act inside a block."""
    return Gates(kind_gates(bank, "lora", gates), kind_gates(bank, "edit", gates))
