"""bfloat16 arrays that loops stack and caches take in, carried as 16-bit integers.

XLA's CPU backend has no bfloat16 slices: written as they are, a loop that stacks or reads one layer of [L, ...] converts the whole stack
to float32 and back at every layer, and a step spends more time there than in its products; so does a decoding step with its cache.
As integers they are copied as they stand; elsewhere a cast of bits costs nothing. float32 arrays pass through untouched.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

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


def write_slice(x: Array, part: Array, start: Array, axis: int) -> Array:
    """`jax.lax.dynamic_update_slice_in_dim`; no gradient passes through bfloat16."""
    return _from_bits(jax.lax.dynamic_update_slice_in_dim(to_bits(x), to_bits(part), start, axis))


def write_cells(cache: Float[Array, "B K S H"], new: Float[Array, "B K T H"], slot: Int[Array, " B"]) -> Float[Array, "B K S H"]:
    """The cache with each row's new cells written from its `slot` on; no gradient passes through bfloat16.

    A cast of bits copies the array on CPU: for a single cell, choosing it among all is the one copy that is needed (60 caches of 1.2 MB: 7
    ms a step, 40 as bits, 83 as bfloat16).
    """
    written = jax.vmap(partial(write_slice, axis=1))
    if cache.dtype != jnp.bfloat16 or new.shape[2] > 1:
        return written(cache, new, slot)
    here = (jnp.arange(cache.shape[2])[None] == slot[:, None])[:, None, :, None]
    return jax.lax.platform_dependent(cache, new, slot, cpu=lambda cache, new, _: jnp.where(here, new, cache), default=written)
