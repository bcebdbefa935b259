"""The product of states with a weight matrix: no gradient that nobody asks for, and each one in the form compilers do well."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Float

from meetjax.errors import MeetjaxError
from meetjax.models.quant import is_quantized, plain
from meetjax.types import Array


@jax.custom_vjp
def dot(x: Float[Array, "... in"], w: Float[Array, "in out"] | Any) -> Float[Array, "... out"]:
    """x W in x's dtype with float32 accumulation.

    The gradient in a frozen W is never written down, so nothing is kept for it; the gradient in a W that trains is float32 until
    it takes W's dtype. A quantised W is made a matrix of numbers here, at every use, and cannot train.
    """
    return _contract(x, w, 0)


def _contract(x: Array, w: Any, axis: int) -> Array:
    """On CPU a bf16 product with a bf16 result is slower than float32, so it is float32 and then cast. Elsewhere units accumulate in
    float32 anyway, and a float32 result would be what devices with parts of the sum exchange: twice the bytes.
    """
    matrix = plain(w).astype(x.dtype)

    def product(kind: Any) -> Array:
        return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=kind)

    if x.dtype == jnp.float32:
        return product(jnp.float32)
    return jax.lax.platform_dependent(cpu=lambda: product(jnp.float32).astype(x.dtype), default=lambda: product(x.dtype))


def _forward(x: Any, w: Any) -> tuple[Array, tuple]:
    parts = jax.tree.leaves(w, is_leaf=_is_primal)
    value = jax.tree.map(lambda part: part.value, w, is_leaf=_is_primal)
    trains = any(part.perturbed for part in parts)
    if trains and is_quantized(value):
        raise MeetjaxError("a quantised weight cannot train", fix="train adapters on it, or load the base with quantize none")
    return _contract(x.value, value, 0), (x.value if trains else None, value)


def _is_primal(node: Any) -> bool:
    return isinstance(node, CustomVJPPrimal)


def _backward(kept: tuple, g: Any) -> tuple:
    x, w = kept
    if isinstance(g, SymbolicZero):
        return None, None
    return _contract(g, w, 1), None if x is None else _weight_gradient(x, g).astype(w.dtype)


def _weight_gradient(x: Float[Array, "... in"], g: Float[Array, "... out"]) -> Float[Array, "in out"]:
    """x^T g in float32. The narrower side is the one that gets transposed, and behind a barrier: left alone, XLA turns
    (g^T x)^T into x^T g, and on CPU it then computes the wide side anew, element by element and out of order (8 times slower).
    """
    x, g = (side.reshape(-1, side.shape[-1]) for side in (x, g))
    narrow, wide = (g, x) if g.shape[1] < x.shape[1] else (x, g)
    product = jax.lax.dot_general(narrow, wide, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T if narrow is g else product


dot.defvjp(_forward, _backward, symbolic_zeros=True)
