"""Attention of one layer over a layout: XLA's products with a gradient of their own, and the kernels of TPUs and GPUs."""

from __future__ import annotations

from functools import partial, reduce
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.errors import MeetjaxError
from meetjax.models.bits import keep, write_cells
from meetjax.models.config import ModelConfig
from meetjax.models.layers import rotate
from meetjax.models.layout import MASKED, Layout
from meetjax.models.splash import splash_attention
from meetjax.types import Array

Blocks = tuple[tuple[int, int], ...]
"""[begin, end) of each block of queries."""

BLOCK, MOST_BLOCKS = 64, 8
"""Queries of a block of attention at least, and blocks at most (twice as fast as all at once on CPU, 208 to 736 tokens)."""


def choose_attention(config: ModelConfig, asked: str, platform: str, length: int) -> tuple[str, str]:
    """(one of `config.ATTENTIONS`, a line that says why) for training on rows of `length` tokens, soft prompts included.

    auto: splash on TPU and xla elsewhere. Splash masks by array order and groups of tokens, so it has no sliding window shorter than the
    rows; cuDNN has no soft prompt and no shared one (`make_layout` raises), and no float32. Decoding steps and left-padded prompts are
    xla's whatever is chosen. Raises MeetjaxError for what was asked by name and cannot be.
    """
    by = ("splash" if platform == "tpu" else "xla") if asked == "auto" else asked
    limit = ""
    if by != "xla" and config.sliding_window is not None and config.sliding_window < length:
        limit = f"no sliding window shorter than rows of {length}"
    if by == "cudnn" and config.dtype != "bfloat16":
        limit = "bfloat16"
    if platform not in {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}.get(by, (platform,)):
        limit = {"splash": "a TPU", "cudnn": "an NVIDIA GPU"}[by]
    if not limit:
        return by, f"attention {by}" + (f": on {platform}" if asked == "auto" else ": as asked")
    if asked == "auto":
        return "xla", f"attention xla: {by} needs {limit}"
    found = f"{platform}, {config.dtype}, window {config.sliding_window}"
    raise MeetjaxError("recipe: attention", expected=f"{limit} for {by}", found=found, fix="use auto")


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], bias: Array | None, lead: int | None = None
) -> Array:
    """softmax(q k / sqrt(H) + bias) v, [B, T, N, H]; query heads share their group's keys; bias None is plain causal.

    lead: for queries of which none sees a key behind it, but for the first `lead`, which may see the next one too: a block of
    queries then leaves out the keys behind it, half of all. Products and softmax accumulate in float32. Keys come with heads
    before slots: a product over the other order copies the cache at every step (measured on CPU, one query against 160 slots: 5
    times slower).
    """
    batch, length, heads, width = q.shape
    grouped = jnp.moveaxis((q * width**-0.5).reshape(batch, length, k.shape[1], -1, width), 1, 3)
    out: Any = _attend(_blocks(length, lead), keep(grouped), keep(k), keep(v), bias)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)


def _blocks(length: int, lead: int | None) -> Blocks:
    """Blocks of queries: few, but small enough that the scores of one stay in a core's cache; all at once where lead is None."""
    if lead is None:
        return ((0, length),)
    size = BLOCK * max(1, -(-length // (BLOCK * MOST_BLOCKS)))
    edges = [0, *range(-(-(lead + 1) // size) * size, length, size), length]
    return tuple(pairwise(edges))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], bias: Any) -> Array:
    return _attend_forward(blocks, q, k, v, bias)[0]


def _attend_forward(blocks: Blocks, q: Array, k: Array, v: Array, bias: Any) -> tuple[Array, tuple]:
    outs, normalisers = [], []
    for block in blocks:
        own, keys, values, mask = _cut(block, q, k, v, bias)
        scores = _scores(own, keys, mask)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outs.append((_batched(weights.astype(v.dtype), values, 2) / total).astype(v.dtype))
        normalisers.append(top + jnp.log(total))
    out = keep(jnp.concatenate(outs, axis=3))
    return out, (q, k, v, bias, out, keep(jnp.concatenate(normalisers, axis=3)))


def _attend_backward(blocks: Blocks, kept: tuple, g: Array) -> tuple:
    """Gradients from the kept log-normaliser: the weights w once more, then d scores = w (g v - sum_h g out)."""
    q, k, v, bias, out, normaliser = kept
    share = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    of_queries, of_keys, of_values, of_bias = [], [], [], []
    for block in blocks:
        begin, end = block
        own, keys, values, mask = _cut(block, q, k, v, bias)
        pull, unseen = g[:, :, :, begin:end], (0, k.shape[2] - keys.shape[2])
        weights = jnp.exp(_scores(own, keys, mask) - normaliser[:, :, :, begin:end])
        scores = weights * (_batched(pull, values, 3) - share[:, :, :, begin:end])
        narrow = scores.astype(q.dtype)
        of_queries.append(_batched(narrow, keys, 2).astype(q.dtype))
        of_keys.append(jnp.pad(_pooled(narrow, own), ((0, 0), (0, 0), unseen, (0, 0))))
        of_values.append(jnp.pad(_pooled(weights.astype(g.dtype), pull), ((0, 0), (0, 0), unseen, (0, 0))))
        if bias is not None:
            of_bias.append(jnp.pad(jnp.sum(scores, axis=(1, 2))[:, None], ((0, 0), (0, 0), (0, 0), unseen)))
    of_mask = None if bias is None else jnp.concatenate(of_bias, axis=2)
    to_keys, to_values = reduce(jnp.add, of_keys).astype(k.dtype), reduce(jnp.add, of_values).astype(v.dtype)
    return jnp.concatenate(of_queries, axis=3), to_keys, to_values, of_mask


_attend.defvjp(_attend_forward, _attend_backward)


def _cut(block: tuple[int, int], q: Array, k: Array, v: Array, bias: Any) -> tuple[Array, Array, Array, Any]:
    """A block's queries, the keys and values that it sees, and its part of the bias: the queries are those of the last keys."""
    begin, end = block
    seen = end + k.shape[2] - q.shape[3]
    return q[:, :, :, begin:end], k[:, :, :seen], v[:, :, :seen], None if bias is None else bias[:, :, begin:end, :seen]


def _scores(q: Array, k: Array, bias: Any) -> Float[Array, "B K G T S"]:
    scores = _batched(q, k, 3)
    if bias is None:
        length, slots = scores.shape[3:]
        return jnp.where(jnp.tril(jnp.ones((length, slots), jnp.bool_), slots - length), scores, MASKED)
    return scores + bias[:, :, None]


def _batched(x: Float[Array, "B K G T X"], y: Float[Array, "B K ..."], axis: int) -> Float[Array, "B K G T Y"]:
    """float32 product of x with its group's y over the last axis of x and `axis` of y: one matrix for all heads of a group."""
    flat = x.reshape(*x.shape[:2], -1, x.shape[4])
    product = jax.lax.dot_general(flat, y, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:4], -1)


def _pooled(x: Float[Array, "B K G T S"], y: Float[Array, "B K G T H"]) -> Float[Array, "B K S H"]:
    """float32 sum over a group's heads and queries of x times y."""
    x, y = (z.reshape(*z.shape[:2], -1, z.shape[4]) for z in (x, y))
    return jax.lax.dot_general(x, y, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def make_attend(layout: Layout, windowed: bool | Array = True, cache: tuple[Array, Array] | None = None):
    """The `attend` of `layers.block` for one layer; it returns (output, (keys, values)).

    windowed: whether this layer uses the sliding window; a traced bool inside a scan. cache: (keys, values) [B, K, S, H]: each row's
    new keys are written from its cell of `layout.slot` on and the queries attend to all of it. Without it they attend to their own
    keys. Writing at a cell of its own for every row costs what writing at one cell for all did (measured on CPU, 8 and 32 rows).
    """
    bias = layout.bias
    if layout.window_bias is not None and bias is not None:
        bias = jnp.where(windowed, layout.window_bias, bias)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        q, k = rotate(q, layout.angles), rotate(k, layout.angles)
        k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        slot = layout.slot
        if cache is not None and slot is not None:
            k, v = write_cells(cache[0], k, slot), write_cells(cache[1], v, slot)
        if cache is None and layout.by == "splash":
            return keep(splash_attention(q, k, v, layout.features, layout.lead)), (k, v)
        if cache is None and layout.by == "cudnn":
            own = (jnp.moveaxis(x, 1, 2) for x in (k, v))
            return keep(jax.nn.dot_product_attention(q, *own, is_causal=True, implementation="cudnn")), (k, v)
        return attention(q, k, v, bias, layout.lead if cache is None else None), (k, v)

    return attend
