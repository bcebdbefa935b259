"""Token log-probabilities at the head: no [B, T, V] tensor, answer tokens only, and two products where a gradient is taken."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Bool, Float, Int

from meetjax.models.layers import head_of, logits, logits_transposed, split_rows
from meetjax.types import BATCH_AXES, Array, Params

CHUNK = 256
"""Positions of one device whose logits exist at one time: 50 MB for a vocabulary of 49,152."""


def token_logps(
    params: Params, hidden: Float[Array, "B T D"], source: Int[Array, "B T"], targets: Int[Array, "B T"], scored: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """log p(targets[b, t] | hidden[b, source[b, t]]) in nats where `scored`, 0 elsewhere; float32.

    Only scored positions meet the head, `CHUNK` at a time. Since d log p / d h = W[target] - sum_v p_v W[v] does not depend on
    the loss, the gradient in the hidden states is made on the way forward, from the same probabilities; the gradient in a head
    that trains computes them again, and in a frozen head nothing is computed.
    """
    ways = _ways(hidden.shape[0])
    first = jnp.arange(hidden.shape[0], dtype=jnp.int32) % (hidden.shape[0] // ways) * hidden.shape[1]
    flat = _thin(hidden.reshape(ways, -1, hidden.shape[2]))
    source, targets, scored = (x.reshape(ways, -1) for x in (source + first[:, None], targets, scored))
    return _logps(_whole_width(head_of(params)), flat, source, targets, scored).reshape(hidden.shape[:2])


def _ways(rows: int) -> int:
    """Into how many parts the batch is split over devices: each gathers from its own rows."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)
    return ways if rows % ways == 0 else 1


def _thin(x: Float[Array, "W N D"]) -> Float[Array, "W N D"]:
    """Split over the width beside the rows: places are then gathered where they lie, and no device holds all states of its rows."""
    return split_rows(x, None, "model")


def _whole_width(head: Params) -> Params:
    """The head split over the vocabulary alone, once and not in every chunk."""
    if "model" not in jax.sharding.get_abstract_mesh().axis_names:
        return head
    ((name, weight),) = head.items()
    spec = jax.sharding.PartitionSpec(*(("model", None) if name == "embed" else (None, "model")))
    return {name: jax.lax.with_sharding_constraint(weight, spec)}


def _pick(x: Float[Array, "W N ..."], places: Int[Array, "W M"]) -> Float[Array, "W M ..."]:
    """x[w, places[w, m]]."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


def _queue(scored: Bool[Array, "W N"]) -> tuple[Int[Array, "W M"], Int[Array, ""]]:
    """(all places, the scored ones first, M a whole number of chunks; how many chunks hold a scored one)."""
    order = jnp.argsort(~scored, axis=1, stable=True).astype(jnp.int32)
    longest = jnp.max(jnp.sum(scored, axis=1, dtype=jnp.int32))
    return jnp.pad(order, ((0, 0), (0, -order.shape[1] % CHUNK)), mode="edge"), (longest + CHUNK - 1) // CHUNK


def _chunk(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * CHUNK, CHUNK, axis=1)


def _write(x: Array, part: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * CHUNK, axis=1)


def _pull(head: Params, states: Float[Array, "W C D"], target: Int[Array, "W C"]) -> tuple[Array, Array]:
    """(log-probability of the target, its derivative in the logits: one-hot less softmax)."""
    z = logits(head, states)
    own = jnp.take_along_axis(z, target[:, :, None], axis=2)
    top = jnp.max(z, axis=2, keepdims=True)
    # Behind a barrier: fused into the sum, the exponential runs on CPU at a tenth of its speed, and once more for the softmax.
    powers = jax.lax.optimization_barrier(jnp.exp(z - top))
    total = jnp.sum(powers, axis=2, keepdims=True)
    pull = jax.nn.one_hot(target, z.shape[2], dtype=z.dtype) - powers / total
    return (own - top - jnp.log(total))[:, :, 0], pull


def _run(head: Params, hidden: Array, source: Array, targets: Array, scored: Array, slopes: Array | None) -> tuple[Array, Array | None]:
    """(log-probabilities [W, N], derivatives in the hidden states [W, M, D] in the order of the queue, if a place for them is given)."""
    order, chunks = _queue(scored)

    def body(i: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        scores, slopes = carry
        places = _chunk(order, i)
        own, pull = _pull(head, split_rows(_pick(hidden, _pick(source, places))), _pick(targets, places))
        if slopes is not None:
            slopes = _write(slopes, _thin(logits_transposed(head, pull.astype(slopes.dtype))), i)
        return _write(scores, own, i), slopes

    scores, slopes = jax.lax.fori_loop(0, chunks, body, (jnp.zeros(order.shape, jnp.float32), slopes))
    ranks = jnp.argsort(order[:, : scored.shape[1]], axis=1).astype(jnp.int32)
    return jnp.where(scored, _pick(scores, ranks), 0.0), slopes


@jax.custom_vjp
def _logps(head: Params, hidden: Array, source: Array, targets: Array, scored: Array) -> Float[Array, "W N"]:
    return _run(head, hidden, source, targets, scored, None)[0]


def _forward(*arguments: Any) -> tuple[Array, tuple]:
    leaves = jax.tree.leaves(arguments[0], is_leaf=_is_primal)
    head, hidden, source, targets, scored = jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=_is_primal)
    room = _thin(jnp.zeros((hidden.shape[0], scored.shape[1] + -scored.shape[1] % CHUNK, hidden.shape[2]), hidden.dtype))
    scores, slopes = _run(head, hidden, source, targets, scored, room)
    trains = any(leaf.perturbed for leaf in leaves)
    return scores, (slopes, source, scored, (head, hidden, targets) if trains else None)


def _is_primal(node: Any) -> bool:
    return isinstance(node, CustomVJPPrimal)


def _backward(kept: tuple, cotangent: Any) -> tuple:
    slopes, source, scored, training = kept
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    order, chunks = _queue(scored)
    counts = jnp.sum(scored, axis=1, keepdims=True)
    pulls = jnp.where(jnp.arange(order.shape[1])[None] < counts, _pick(cotangent, order), 0.0)  # the queue's filling pulls nothing
    moved = pulls[:, :, None].astype(slopes.dtype) * slopes
    blank = _thin(jnp.zeros((source.shape[0], source.shape[1], slopes.shape[2]), slopes.dtype))
    hidden_gradient = jax.vmap(lambda x, places, parts: x.at[places].add(parts))(blank, _pick(source, order), moved)
    if training is None:
        return None, hidden_gradient, None, None, None
    head, hidden, targets = training

    def body(i: Array, gradient: Array) -> Array:
        places = _chunk(order, i)
        states = split_rows(_pick(hidden, _pick(source, places)))
        pull = _pull(head, states, _pick(targets, places))[1] * _chunk(pulls, i)[:, :, None]
        sides = (states, pull) if "head" in head else (pull, states)
        return gradient + jnp.einsum("wcx,wcy->xy", *(side.astype(hidden.dtype) for side in sides), preferred_element_type=jnp.float32)

    ((name, weight),) = head.items()
    gradient = jax.lax.fori_loop(0, chunks, body, jnp.zeros(weight.shape, jnp.float32))
    return {name: gradient.astype(weight.dtype)}, hidden_gradient, None, None, None


_logps.defvjp(_forward, _backward, symbolic_zeros=True)
