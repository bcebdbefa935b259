"""The product of states with a weight matrix: no gradient that nobody asks for, and each one in the form compilers do well."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from meetjax.types import Array


@jax.custom_vjp
def dot(x: Float[Array, "... in"], w: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """x W in x's dtype with float32 accumulation.

    The gradient in a frozen W is never written down, so nothing is kept for it; the gradient in a W that trains is float32 until
    it takes W's dtype.
    """
    return _contract(x, w, 0)


def _contract(x: Array, w: Array, axis: int) -> Array:
    """On CPU a bf16 product with a bf16 result is slower than float32, so it is float32 and then cast. Elsewhere units accumulate in
    float32 anyway, and a float32 result would be what devices with parts of the sum exchange: twice the bytes.
    """

    def product(kind: Any) -> Array:
        return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=kind)

    if x.dtype == jnp.float32:
        return product(jnp.float32)
    return jax.lax.platform_dependent(cpu=lambda: product(jnp.float32).astype(x.dtype), default=lambda: product(x.dtype))


def _forward(x: Any, w: Any) -> tuple[Array, tuple]:
    return _contract(x.value, w.value, 0), (x.value if w.perturbed else None, w.value)


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
