"""bfloat16 arrays that loops stack, carried as 16-bit integers.

XLA's CPU backend has no bfloat16 slices: written as they are, a loop that stacks or reads one layer of [L, ...] converts the whole stack
to float32 and back at every layer, and a training step spends more time there than in its products. As integers they are copied
as they stand; elsewhere a cast of bits costs nothing. float32 arrays pass through untouched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from meetjax.types import Array

_KEPT = "kept"
KEPT_ONLY = jax.checkpoint_policies.save_only_these_names(_KEPT)
"""The policy of `jax.checkpoint` that keeps what was given to `keep` and computes the rest again."""


def to_bits(x: Array) -> Array:
    """x's bits; no gradient passes."""
    return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16) if bits.dtype == jnp.uint16 else bits


@jax.custom_vjp
def held(bits: Array, x: Array) -> Array:
    """x, read from its bits: its value is never used, only its gradient, so that nothing keeps it."""
    return _from_bits(bits)


held.defvjp(lambda bits, x: (_from_bits(bits), None), lambda _, g: (None, g))


def keep(x: Array) -> Array:
    """x, named so that recomputation under `KEPT_ONLY` keeps it."""
    return held(checkpoint_name(to_bits(x), _KEPT), x) if x.dtype == jnp.bfloat16 else checkpoint_name(x, _KEPT)
