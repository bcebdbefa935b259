"""A frozen base in 8 or 4 bits: the linear sites of the blocks as integers, everything else as it was.

    W[l, i, o] = scale[l, i // tile, o] (q[l, i, o] - zero[l, i // tile, o])

A quantised leaf is a qwix QArray, itself a tree of three arrays that lead with the layer axis, so that it is scanned, sliced, split over
devices and passed through `jax.jit` like the array in whose place it stands; `products.dot` alone computes with it. QLoRA (Dettmers et
al. 2023, arXiv 2305.14314) is any adapter on such a base. int8 takes 1.047 bytes a weight, 1.094 at the sites in `FINE`, and int4
0.578, scales (bfloat16) and zeros included.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float
from qwix import QArray

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.types import Array, Params

Quantize = Literal["none", "int8", "int4"]
TILES, FINE = {"int8": 64, "int4": 32}, ("q", "k", "v")
"""Inputs of a column that share a scale and a zero; 32 at the sites in `FINE`, to whose error the logits are the most sensitive."""
RANGES = {"int8": (-128, 127), "int4": (-8, 7)}
STRETCHES, TRIES = {"int8": (0.995, 1.155), "int4": (0.8, 1.2)}, 33
"""Multiples of the step that just covers a tile which are tried: integers of a slightly other one can lie nearer to its numbers."""


def tile_of(site: str, kind: str) -> int:
    """How many inputs share a scale; where it does not divide the axis, its greatest common divisor with it does."""
    return 32 if site in FINE else TILES[kind]


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of the parameters is integers with scales."""
    return isinstance(leaf, QArray)


def check_quantize(kind: str) -> None:
    """Raises MeetjaxError for a name that is no `Quantize`."""
    if kind not in get_args(Quantize):
        raise MeetjaxError("argument quantize", expected=" or ".join(get_args(Quantize)), found=kind)


def quantize(leaf: Float[Array, "L I out"], kind: Quantize, tile: int) -> QArray:
    """One stacked matrix in "int8" or "int4": of `TRIES` scales a tile, the one with the smallest squared error, rounded to nearest."""
    return jax.lax.map(partial(_quantize_matrix, kind=kind, tile=tile), leaf)  # one layer at a time: trying takes room


def _quantize_matrix(leaf: Float[Array, "in out"], kind: Quantize, tile: int) -> QArray:
    (low, high), (first, last) = RANGES[kind], STRETCHES[kind]
    rows, columns = leaf.shape
    tile = math.gcd(tile, rows)
    w = leaf.astype(jnp.float32).reshape(rows // tile, tile, columns)
    least, most = jnp.minimum(jnp.min(w, 1, keepdims=True), 0.0), jnp.maximum(jnp.max(w, 1, keepdims=True), 0.0)
    step = (most - least) / (high - low)

    def rounded(stretch: Array) -> tuple[Array, Array, Array]:
        scale = jnp.where(step > 1e-30, step * stretch, 1.0).astype(jnp.bfloat16).astype(jnp.float32)
        zero = jnp.clip(jnp.round(low - least / scale), low, high)
        return jnp.clip(jnp.round(w / scale + zero), low, high), scale, zero

    def keep_better(i: Array, kept: tuple[Array, Array]) -> tuple[Array, Array]:
        stretch = first + (last - first) / (TRIES - 1) * i.astype(jnp.float32)
        q, scale, zero = rounded(stretch)
        error = jnp.sum(jnp.square((q - zero) * scale - w), 1, keepdims=True)
        return jnp.minimum(error, kept[0]), jnp.where(error < kept[0], stretch, kept[1])

    start = jnp.full_like(step, jnp.inf), jnp.ones_like(step)
    q, scale, zero = rounded(jax.lax.fori_loop(0, TRIES, keep_better, start)[1])
    return QArray(q.reshape(leaf.shape).astype(kind), scale[:, 0].astype(jnp.bfloat16), zero[:, 0].astype(kind), kind)


@partial(jax.jit, static_argnames=("kind", "tile", "where"))
def _quantize_on(leaf: Array, kind: Quantize, tile: int, where: NamedSharding | None) -> QArray:
    made = quantize(leaf, kind, tile)
    return made if where is None else jax.lax.with_sharding_constraint(made, where)


def quantize_leaf(leaf: Array, kind: Quantize, tile: int) -> QArray:
    """`quantize` as one program; of a matrix that is split over a mesh, the result split by `leaf_sharding`."""
    where = getattr(leaf, "sharding", None)
    return _quantize_on(leaf, kind, tile, leaf_sharding(where, leaf.shape, tile) if isinstance(where, NamedSharding) else None)


def quantize_params(params: Params, kind: Quantize) -> Params:
    """The parameters with every linear site quantised; "none" leaves them alone. `load` does the same leaf by leaf as it reads."""
    check_quantize(kind)
    if kind == "none":
        return params
    made = {name: quantize_leaf(params["blocks"][name], kind, tile_of(name, kind)) for name in sites.LINEAR}
    return params | {"blocks": params["blocks"] | made}


def plain(leaf: Any) -> Array:
    """The numbers that a leaf stands for: itself, or what its integers mean in float32."""
    return qwix.dequantize(leaf.astype(jnp.float32)) if is_quantized(leaf) else leaf


def dequantize_params(params: Params) -> Params:
    """The parameters without a quantised leaf, in the dtype of the embedding: what merging adapters and saving start from."""
    dtype = params["embed"].dtype
    return jax.tree.map(lambda leaf: plain(leaf).astype(dtype) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def leaf_sharding(where: NamedSharding, shape: tuple[int, ...], tile: int) -> NamedSharding:
    """Where all three arrays of a quantised leaf live, given where its matrix [L, in, out] would.

    A tile is never cut. Where the number of tiles does not divide (11,008 inputs over 16 devices), the mesh axes of the input axis
    split the output axis further; where they cannot do that either, the leaf is whole along them.
    """

    def ways(axes: tuple[str, ...]) -> int:
        return math.prod(where.mesh.shape[axis] for axis in axes)

    parts = ((part,) if isinstance(part, str) else tuple(part or ()) for part in (*where.spec, None, None, None)[:3])
    layers, rows, columns = parts
    if (shape[1] // math.gcd(tile, shape[1])) % ways(rows):
        rows, columns = (), columns if shape[2] % ways(columns + rows) else columns + rows
    return NamedSharding(where.mesh, PartitionSpec(*(part or None for part in (layers, rows, columns))))


def quantized_shapes(config: ModelConfig, kind: Quantize, dtype: Any = jnp.bfloat16) -> Params:
    """Tree of `jax.ShapeDtypeStruct` of the parameters in `dtype`, linear sites in `kind`: for compiling without weights."""
    check_quantize(kind)
    made = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), sites.shapes(config), is_leaf=lambda n: isinstance(n, tuple))
    if kind != "none":
        made["blocks"] |= {
            name: jax.eval_shape(lambda x, n=name: quantize(x, kind, tile_of(n, kind)), made["blocks"][name]) for name in sites.LINEAR
        }
    return made


def quantized_shardings(config: ModelConfig, kind: Quantize, shardings: dict[str, Any]) -> dict[str, Any]:
    """The tree of NamedSharding for the parameters in `kind`, from that of the same structure for the floating-point ones."""
    if kind == "none":
        return shardings
    shapes = sites.shapes(config)["blocks"]
    made = {name: leaf_sharding(shardings["blocks"][name], shapes[name], tile_of(name, kind)) for name in sites.LINEAR}
    return shardings | {"blocks": shardings["blocks"] | made}
