"""The arithmetic of a decoder: plain functions on arrays, and the only code that reads adapter leaves.

Order inside a block, with every adapter site:

    x = norm(h);  q, k, v = edit(x W + b + lora(x));  rope;  attention;  h += edit(attn W_o + lora(attn))
    x = norm(h);  m = silu(x W_gate + lora(x)) * (x W_up + lora(x));  h += edit(m W_down + lora(m))

One primitive a kind: `lora_deltas`, `edit_output`, and `head_rewards` behind the last norm; soft prompts act in `attention.py`, the
identity block is a call of `block`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from meetjax.models.bits import keep
from meetjax.models.config import ModelConfig
from meetjax.models.products import dot
from meetjax.types import BATCH_AXES, Array

FEW = 64
"""Tokens up to which putting the low-rank factors side by side would cost more than the product: a decoding step, say."""


class Gates(NamedTuple):
    """Per-row gates of the two kinds that act inside a block; a leading axis of 1 means all rows alike."""

    lora: Float[Array, "B E"] | None
    edit: Float[Array, "B E"] | None


def pin(config: ModelConfig, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Keeps the residual stream split as `config.residual` says: rows over the batch axes and, unless `batch`, tokens over `model`.

    Left alone, the partitioner splits the width to match sharded weights and replicates the batch: 7B steps stop fitting. With
    tokens split too, what a step keeps of each layer is split over all devices; fewer tokens than devices stay whole.
    """
    ways = jax.sharding.get_abstract_mesh().shape.get("model", 1)
    return split_rows(h, "model" if config.residual == "sequence" and h.shape[1] >= ways else None)


def split_rows(h: Float[Array, "B ..."], *others: str | None) -> Float[Array, "B ..."]:
    """Splits rows over the batch axes of the mesh, if there is one and they divide, the next axes over `others`, and no more."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    if not axes or h.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return h
    others = tuple(axis if axis in mesh.axis_names else None for axis in others)
    return jax.lax.with_sharding_constraint(h, PartitionSpec(axes, *others, *[None] * (h.ndim - 1 - len(others))))


def embed(config: ModelConfig, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table. On a mesh that divides, every device looks its rows up in its part of the width; a table split over the vocabulary
    would be gathered whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if "model" not in mesh.axis_names or table.shape[1] % mesh.shape["model"] or tokens.shape[0] % ways:
        return table[tokens]
    specs = PartitionSpec(None, "model"), PartitionSpec(axes)
    look_up = jax.shard_map(lambda part, own: part[own], in_specs=specs, out_specs=PartitionSpec(axes, None, "model"), check_vma=False)
    return look_up(table, tokens)


def along_last(vector: Float[Array, " D"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`vector` in x's dtype and rank, so that broadcasting along the last axis is said and not guessed."""
    return jnp.expand_dims(vector.astype(x.dtype), tuple(range(x.ndim - 1)))


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) * weight, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * along_last(weight, x)


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, " H/2"]:
    """Rotary frequencies in radians a token, stretched as `rope_scaling` says (Su et al. 2021, arXiv 2104.09864)."""
    half = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    frequency = (1.0 / np.float32(config.rope_theta) ** half).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        # Wavelengths beyond the low bound are stretched by `factor`, short ones kept, those between are blended.
        turns = scaling.original_max_position * frequency / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return ((1 - blend) * frequency / scaling.factor + blend * frequency).astype(np.float32)
    return frequency


def rope_angles(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]:
    """(cos, sin) of the rotary angles at `positions`, float32."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Applies rotary positions to the halves of each head, as the Hugging Face checkpoints expect."""
    cos, sin = (angle.astype(x.dtype) for angle in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def lora_deltas(
    x: Float[Array, "B T I"], factors: Sequence[tuple[Float[Array, "E I R"], Float[Array, "E R out"]]], gates: Float[Array, "B E"]
) -> list[Float[Array, "B T out"]]:
    """sum_e g_e (x a_e) b_e for each (a, b): exact mixing by rank concatenation, the gate on the middle activation.

    Sites that read the same x share one product with all their a. gates already carry alpha / rank. Interpolating a and b instead
    would add cross terms, so no function offers it.
    """
    if x.shape[0] * x.shape[1] <= FEW:
        middles = [_each(x, a) for a, _ in factors]
    else:
        flat = [jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a, _ in factors]
        middles = jnp.split(dot(x, jnp.concatenate(flat, axis=1)), np.cumsum([a.shape[1] for a in flat])[:-1].tolist(), axis=-1)
    deltas = []
    for middle, (a, b) in zip(middles, factors, strict=True):
        gated = middle * jnp.repeat(gates, a.shape[2], axis=1)[:, None].astype(x.dtype)
        deltas.append(dot(gated, b.reshape(-1, b.shape[2])))
    return deltas


def _each(x: Float[Array, "B T I"], a: Float[Array, "E I R"]) -> Float[Array, "B T E*R"]:
    """x with every a, each as it lies in memory."""
    rows = jnp.broadcast_to(x.reshape(1, -1, x.shape[2]), (a.shape[0], x.shape[0] * x.shape[1], x.shape[2]))
    middle = jax.lax.dot_general(rows, a.astype(x.dtype), (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return jnp.moveaxis(middle, 0, 1).reshape(*x.shape[:2], -1).astype(x.dtype)


def edit_output(
    y: Float[Array, "B T out"], s: Float[Array, "E out"], t: Float[Array, "E out"], gates: Float[Array, "B E"]
) -> Float[Array, "B T out"]:
    """y (1 + sum_e g_e s_e) + sum_e g_e t_e, RED's h2 = l_scaling * h1 + l_bias (Wu et al. 2024, arXiv 2402.15179, sec. 3)."""
    scale, bias = (jnp.einsum("be,eo->bo", gates, v)[:, None] for v in (s, t))
    return (y.astype(jnp.float32) * (1 + scale) + bias).astype(y.dtype)


def linears(x: Array, params: dict, names: tuple[str, ...], lora: Any, edit: Any, gates: Gates) -> list[Array]:
    """The linear sites of one layer that read x: product, bias, then lora, then edit."""
    outputs = {site: dot(x, params[site]) for site in names}
    for site in names:
        if f"{site}_bias" in params:
            outputs[site] += along_last(params[f"{site}_bias"], outputs[site])
    factors = {site: low_rank for site in names if (low_rank := getattr(lora, site, None)) is not None}
    if factors:
        deltas = lora_deltas(x, [(low_rank.a, low_rank.b) for low_rank in factors.values()], gates.lora)
        for site, delta in zip(factors, deltas, strict=True):
            outputs[site] += delta
    for site in names:
        outputs[site] = keep(outputs[site])
        if (vectors := getattr(edit, site, None)) is not None:
            outputs[site] = edit_output(outputs[site], vectors.s, vectors.t, gates.edit)
    return list(outputs.values())


def block(config: ModelConfig, params: dict, h: Float[Array, "B T D"], lora: Any, edit: Any, gates: Gates, attend) -> tuple[Array, Any]:
    """One decoder block: (h, what `attend` returned beside its output, i.e. the new cache).

    `attend(q, k, v) -> ([B, T, N, H], extra)` rotates, reads or writes the cache, and masks.
    """
    rows, length, _ = h.shape
    x = rms_norm(h, params["attn_norm"], config.norm_eps)
    heads = (y.reshape(rows, length, -1, config.head_width) for y in linears(x, params, ("q", "k", "v"), lora, edit, gates))
    attended, extra = attend(*heads)
    (o,) = linears(attended.reshape(rows, length, -1), params, ("o",), lora, edit, gates)
    h = h + o
    x = rms_norm(h, params["mlp_norm"], config.norm_eps)
    gate, up = linears(x, params, ("gate", "up"), lora, edit, gates)
    (down,) = linears(jax.nn.silu(gate) * up, params, ("down",), lora, edit, gates)
    return h + down, extra


def head_of(params: dict) -> dict:
    """The part of the parameters that `logits` reads: the head, or the embedding of a tied model."""
    name = "head" if "head" in params else "embed"
    return {name: params[name]}


def head_rewards(h: Float[Array, "B C D"], head: Any, gates: Float[Array, "B E"]) -> Float[Array, "B C"]:
    """sum_e g_e (u_e . h) of normed hidden states, in float32: a sum of products, since matrix units may round what they multiply."""
    u = jnp.sum(gates[:, :, None] * head.u[None], axis=1, keepdims=True)
    return jnp.sum(h.astype(jnp.float32) * u, axis=2)


def logits(params: dict, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """float32 logits of normed hidden states, through the head or the embedding of a tied model."""
    return _through_head(params, hidden, 0)


def logits_transposed(params: dict, scores: Float[Array, "... V"]) -> Float[Array, "... D"]:
    """float32 product with the transposed head: what a gradient in the logits is in the normed hidden states."""
    return _through_head(params, scores, 1)


def _through_head(params: dict, x: Array, side: int) -> Array:
    # The tied embedding is contracted where it lies: written as a product with its transpose, it may be copied at every step.
    head, axis = (params["head"], side) if "head" in params else (params["embed"], 1 - side)
    return jax.lax.dot_general(x, head.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
