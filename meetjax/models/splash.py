"""Attention by the Pallas splash kernel of JAX on TPU: no scores in memory, and the keys behind a query are never multiplied.

The kernel knows masks that are the same for every row. What differs from row to row (which answer a token belongs to, the gate of a
soft prompt, whether a text has a BOS) is a bias that depends on the group of the query and the group of the key alone, so it is a product
of few features, and these stand as more columns behind q and k: softmax(q k + x y) with x y = bias, and a weight of exactly 0 where
it is `MASKED`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Float

from meetjax.types import BATCH_AXES, Array

LANES = 128
"""Columns of a TPU's vector unit: lengths and heads are filled up to a multiple of them."""
BLOCKS = (512, 256, 128)
"""Queries, and keys, that the kernel takes at a time: the first that divides the length."""


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    features: tuple[Float[Array, "B T X"], Float[Array, "B T X"]] | None = None,
    lead: int = 0,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H) + x y) v over the keys up to each query's own, [B, T, N, H]; features: (x, y), without a gradient.

    lead: the first `lead` queries may also see key `lead`. On a mesh every device takes its own rows and heads. interpret: run the kernel
    in Python, anywhere. Features are rounded to q's dtype, so a real number is given in parts (`split`).
    """
    batch, length, heads, width = q.shape
    q, k, v = jnp.moveaxis(q * width**-0.5, 2, 1), k, v
    if features is not None:
        x, y = (jax.lax.stop_gradient(part).astype(q.dtype)[:, None] for part in features)
        q, k = (jnp.concatenate([z, jnp.broadcast_to(f, (*z.shape[:3], f.shape[3]))], axis=3) for z, f in ((q, x), (k, y)))
        q, k = (_filled(z, 3) for z in (q, k))
    q, k, v = (_filled(z, 2) for z in (q, k, v))
    batch_axes, head_axis, ways = _split(batch, heads)
    # A device with query heads of several devices' keys would have to ask for them: keys are repeated until they divide.
    copies = ways // math.gcd(k.shape[1], ways)
    if copies > 1:
        k, v = (jnp.repeat(z, copies, axis=1) for z in (k, v))
    kernel = _make_kernel(heads // ways, q.shape[2], lead, interpret)
    run: Any = jax.vmap(kernel)
    if batch_axes or head_axis:
        spec = PartitionSpec(batch_axes or None, head_axis)
        run = jax.shard_map(run, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return jnp.moveaxis(run(q, k, v)[:, :, :length], 1, 2)


def split(x: Float[Array, "..."], dtype: str) -> list[Array]:
    """Numbers of `dtype` whose sum is x to float32's last bit: one for float32, three for bfloat16."""
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(1 if dtype == "float32" else 3):
        parts.append(rest.astype(dtype).astype(jnp.float32))
        rest = rest - parts[-1]
    return parts


def _split(batch: int, heads: int) -> tuple[tuple[str, ...], str | None, int]:
    """(mesh axes of the batch, mesh axis of the heads, its size), what does not divide left whole."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    rows = () if batch % math.prod(mesh.shape[axis] for axis in rows) else rows
    ways = mesh.shape["model"] if "model" in mesh.axis_names else 1
    return (rows, "model", ways) if ways > 1 and heads % ways == 0 else (rows, None, 1)


def _filled(x: Array, axis: int) -> Array:
    room = -x.shape[axis] % LANES
    return jnp.pad(x, [(0, room if i == axis else 0) for i in range(x.ndim)]) if room else x


def _make_kernel(heads: int, length: int, lead: int, interpret: bool) -> splash_attention_kernel.SplashAttentionKernel:
    size = next(block for block in BLOCKS if length % block == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size,
        block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip
    if lead:
        allowed = np.tri(length, dtype=np.bool_)
        allowed[:lead, lead] = True
        mask = splash_attention_mask.NumpyMask(allowed)
    else:
        mask = splash_attention_mask.CausalMask((length, length))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
