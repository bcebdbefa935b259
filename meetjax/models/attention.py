"""Who attends to whom: positions, masks, soft-prompt gates and the cache, computed once for all layers.

Soft-prompt columns stand first in the array whatever their place in the text. In meaning the prompt follows a leading BOS
token (BOS keeps position 0, where models park attention) and precedes everything else, so a row's text moves by the length
of the longest prompt that is on for that row: with gate 0 the row is the base model's, positions included.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.errors import MeetjaxError
from meetjax.models.bits import keep
from meetjax.models.config import ModelConfig
from meetjax.models.layers import rope_angles, rotate
from meetjax.models.splash import splash_attention, split
from meetjax.types import Array

MASKED = -1e30
"""Added to a forbidden score: its softmax weight is exactly 0, and a row with nothing to attend to stays finite."""
BLOCK, MOST_BLOCKS = 64, 8
"""Queries of a block of attention at least, and blocks at most (twice as fast as all at once on CPU, 208 to 736 tokens)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """What attention in every layer needs.

    angles: rotary (cos, sin) of the queries; bias: float32[B, 1, T, S] or None for plain causal; window_bias: the same for
    layers with a sliding window (None: no such layers, or the window covers everything); slot: int32[B], from which cell of each
    row's cache the keys of this call go, or None when the queries attend to their own keys; then no query sees a key behind it in
    the array, but the first `lead` (static; the soft prompts) may see as far as the first text token. by (static): who computes it,
    one of `config.ATTENTIONS`; splash has `features` (x [B, T, X], y [B, T, X]) whose product is the bias within these bounds, and no
    bias.
    """

    angles: tuple[Array, Array]
    bias: Float[Array, "B 1 T S"] | None
    window_bias: Float[Array, "B 1 T S"] | None
    slot: Int[Array, " B"] | None = None
    lead: int = dataclasses.field(default=0, metadata={"static": True})
    by: str = dataclasses.field(default="xla", metadata={"static": True})
    features: tuple[Float[Array, "B T X"], Float[Array, "B T X"]] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of a cache, [soft prompts | text | free], as what comes next in each row sees them.

    filled: int32[B], soft prompts included; position: int32[B], of the next token; bias: float32[B, S], added to the scores of a
    cell (log gate of a soft prompt, MASKED where it is off, 0 for text); places: int32[B, S], positions of the cells, None where no layer
    has a sliding window.
    """

    filled: Int[Array, " B"]
    position: Int[Array, " B"]
    bias: Float[Array, "B S"]
    places: Int[Array, "B S"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The text of a batch, as attention sees it.

    index: int32[B, T], place of each query token in its text, negative for left padding; keys: int32[B, S], the same for
    the keys; bos: int32[B], 1 when the text begins with BOS; segments: int32[B, T], tokens attend to their own segment and to
    segment 0, or None; causal (static): one right-padded text a row, so that the plain causal mask is the whole mask; ways (static):
    the number of segments beside segment 0.
    """

    index: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    bos: Int[Array, " B"]
    segments: Int[Array, "B T"] | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    ways: int = dataclasses.field(default=0, metadata={"static": True})


def text_rows(config: ModelConfig, tokens: Int[Array, "B T"], pad: Int[Array, " B"] | None = None) -> Rows:
    """Rows of right-padded text (pad None) or of text behind `pad` tokens of left padding."""
    rows, length = tokens.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    first = tokens[:, 0]
    if pad is not None:
        index = index - pad[:, None]
        first = jnp.take_along_axis(tokens, pad[:, None], axis=1)[:, 0]
    bos = jnp.zeros(rows, jnp.int32) if config.bos_token_id is None else (first == config.bos_token_id).astype(jnp.int32)
    return Rows(index, index, bos, causal=pad is None)


def branched_rows(config: ModelConfig, tokens: Int[Array, "B T"], common: Int[Array, " B"], ends: Int[Array, "B M"]) -> Rows:
    """Rows of one text that goes on in M ways: `common` tokens, then the ways one behind the other, each up to its `ends`.

    Every way sees the common part and itself, and counts its positions on from the common part, as if it stood there alone.
    """
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    begins = jnp.concatenate([common[:, None], ends], axis=1)
    segments = jnp.sum(place[:, :, None] >= begins[:, None], axis=2, dtype=jnp.int32)
    begin = jnp.take_along_axis(begins, jnp.maximum(segments - 1, 0), axis=1)
    positions = jnp.where(segments == 0, place, place - begin + common[:, None])
    return Rows(positions, positions, text_rows(config, tokens).bos, segments, ways=ends.shape[1])


def _text_to_text(rows: Rows) -> Array:
    """float32[B, T, S]: causal, within the segment and segment 0, never to padding; a padding query sees itself."""
    query, key = rows.index[:, :, None], rows.keys[:, None, :]
    allowed = (key <= query) & ((key >= 0) | (key == query))
    if rows.segments is not None:
        owner = rows.segments[:, None, :]
        allowed &= (owner == 0) | (owner == rows.segments[:, :, None])
    return jnp.where(allowed, 0.0, MASKED)


def _text_to_prompt(columns: Float[Array, "B C"], rows: Rows) -> Float[Array, "B T C"]:
    """Bias of text queries on prompt columns: all text but a leading BOS and padding sees them."""
    sees = (rows.index >= rows.bos[:, None])[:, :, None]
    return jnp.where(sees, columns[:, None], MASKED)


def _prompt_columns(prompt: Any, gates: Float[Array, "B E"] | None, rows: Rows) -> tuple[Array, Array, Array]:
    """Bias [B, E*P] of each column (log gate, MASKED where off), its position [B, E*P], and the shift [B] of the row's text."""
    batch = rows.index.shape[0]
    present = jnp.any(prompt.vectors != 0, axis=-1)
    entries, width = present.shape
    gates = jnp.broadcast_to(jnp.ones((1, entries)) if gates is None else gates, (batch, entries))
    on = gates > 0
    log_gate = jnp.where(on, jnp.log(jnp.where(on, gates, 1.0)), MASKED)
    bias = jnp.where(present[None], log_gate[:, :, None], MASKED).reshape(batch, entries * width)
    shift = jnp.max(jnp.where(on, jnp.sum(present, axis=1, dtype=jnp.int32)[None], 0), axis=1)
    place = jnp.tile(jnp.arange(width, dtype=jnp.int32), entries)
    return bias, rows.bos[:, None] + place[None], shift


def _moved(index: Int[Array, "B T"], bos: Int[Array, " B"], shift: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Positions of text behind a prompt of `shift` tokens; a leading BOS stays."""
    return index + jnp.where(index >= bos[:, None], shift[:, None], 0)


def _layout(config: ModelConfig, bias: Array, query: Array, key: Array, slot: Array | None = None, lead: int = 0) -> Layout:
    """Adds the rotary angles and, for models that have one, the mask of the sliding window."""
    window_bias = None
    if config.sliding_window is not None:
        far = query[:, :, None] - key[:, None, :] >= config.sliding_window
        window_bias = jnp.where(far, MASKED, bias)[:, None]
    return Layout(rope_angles(config, query), bias[:, None], window_bias, slot, lead)


def _features(rows: Rows, prompt: Any, columns: tuple | None, dtype: str) -> tuple[Float[Array, "B T X"], Float[Array, "B T X"]] | None:
    """(x, y): x y is the bias of `make_layout` for every pair that array order allows. One feature a group of keys: y says which keys
    are in it, x what each query adds to its scores.
    """
    batch, length = rows.index.shape
    wide = 0 if columns is None else columns[0].shape[1]
    pairs: list[tuple[Array, Array]] = []  # of [B, wide + T]

    def joined(of_prompt: Any, of_text: Any) -> Array:
        parts = ((of_prompt, wide), (of_text, length))
        return jnp.concatenate([jnp.broadcast_to(jnp.asarray(x, jnp.float32), (batch, n)) for x, n in parts], axis=1)

    if rows.segments is not None:
        for segment in range(1, rows.ways + 1):
            own = rows.segments == segment
            pairs.append((joined(MASKED, jnp.where(own, 0.0, MASKED)), joined(0.0, own)))
    if columns is not None:
        bias = columns[0]
        entries = prompt.vectors.shape[0]
        owner = jnp.repeat(jnp.arange(entries), prompt.vectors.shape[1])[None]
        sees = rows.index >= rows.bos[:, None]
        present = jnp.any(prompt.vectors != 0, axis=-1).reshape(1, -1)
        first = jnp.broadcast_to(jnp.arange(length)[None] == 0, (batch, length))
        pairs.append((joined(jnp.where(rows.bos == 1, 0.0, MASKED)[:, None], 0.0), joined(0.0, first)))
        pairs.append((joined(0.0, MASKED), joined(~present, 0.0)))
        # The gate of an entry is the bias of any of its columns that is there, so of the largest.
        for entry in range(entries):
            gate = jnp.max(jnp.where(owner == entry, bias, MASKED), axis=1, keepdims=True)
            whole = joined(jnp.where(owner == entry, 0.0, MASKED), jnp.where(sees, gate, MASKED))
            pairs += [(part, joined(owner == entry, 0.0)) for part in split(whole, dtype)]
    if not pairs:
        return None
    x, y = (jnp.stack(side, axis=2) for side in zip(*pairs, strict=True))
    return x, y


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


def make_layout(config: ModelConfig, rows: Rows, prompt: Any = None, gates: Float[Array, "B E"] | None = None) -> Layout:
    """Layout of whole sequences, [soft prompts | text] against the same keys.

    prompt: the bank's `prompt` or None; gates: its per-row gates, None for 1. Mixing adds log g to the scores of text rows on
    prompt columns, so g = 0 masks them exactly. The bias costs 4 B T S bytes; plain causal text has none, nor has splash, which gets it as
    features. Raises MeetjaxError for a mask that the kernel of `config.attention` lacks.
    """
    chosen = _prompt_columns(prompt, gates, rows) if prompt is not None else None
    lead = 0 if chosen is None else chosen[1].shape[1]
    by = _able(config, rows, lead)
    if by == "splash":
        positions = rows.index
        if chosen is not None:
            positions = jnp.concatenate([chosen[1], _moved(rows.index, rows.bos, chosen[2])], axis=1)
        return Layout(rope_angles(config, positions), None, None, lead=lead, by=by, features=_features(rows, prompt, chosen, config.dtype))
    if prompt is None or chosen is None:
        window = config.sliding_window
        if rows.causal and (window is None or window >= rows.index.shape[1]):
            return Layout(rope_angles(config, rows.index), None, None, by=by)
        return _layout(config, _text_to_text(rows), rows.index, rows.keys)
    columns, places, shift = chosen
    owner = jnp.repeat(jnp.arange(prompt.vectors.shape[0]), prompt.vectors.shape[1])
    within = (owner[:, None] == owner[None])[None] & (places[:, None, :] <= places[:, :, None])
    to_bos = (rows.keys >= 0) & (rows.keys < rows.bos[:, None])
    to_bos = jnp.broadcast_to(to_bos[:, None], (*places.shape, rows.keys.shape[1]))
    bias = jnp.concatenate(
        [
            jnp.concatenate([jnp.where(within, 0.0, MASKED), jnp.where(to_bos, 0.0, MASKED)], axis=2),
            jnp.concatenate([_text_to_prompt(columns, rows), _text_to_text(rows)], axis=2),
        ],
        axis=1,
    )
    positions = jnp.concatenate([places, _moved(rows.index, rows.bos, shift)], axis=1)
    return _layout(config, bias, positions, positions, lead=places.shape[1])


def _able(config: ModelConfig, rows: Rows, lead: int) -> str:
    """The kernel of `config.attention` for these rows; xla for left-padded ones. Raises MeetjaxError where it cannot say their mask."""
    padded = not rows.causal and rows.segments is None
    if config.attention == "xla" or padded:
        return "xla"
    length = rows.index.shape[1] + lead
    if config.sliding_window is not None and config.sliding_window < length:
        raise MeetjaxError(
            f"attention: {config.attention}",
            expected=f"no sliding window shorter than {length} tokens",
            found=config.sliding_window,
            fix="use xla",
        )
    if config.attention == "cudnn" and (lead or rows.segments is not None):
        found = "a soft prompt" if lead else "a shared prompt (data.shared_prompt)"
        raise MeetjaxError("attention: cudnn", expected="plain causal rows", found=found, fix="use xla")
    return config.attention


def make_cells(
    config: ModelConfig, rows: Rows, lengths: Int[Array, " B"], capacity: int, prompt: Any = None, gates: Float[Array, "B E"] | None = None
) -> Cells:
    """Cells of a cache that holds right-padded texts of `lengths` tokens, with room for `capacity`, behind the bank's soft prompts."""
    index = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (lengths.shape[0], capacity))
    windowed = config.sliding_window is not None
    if prompt is None:
        return Cells(lengths, lengths, jnp.zeros(index.shape), index if windowed else None)
    columns, places, shift = _prompt_columns(prompt, gates, rows)
    bias = jnp.concatenate([columns, jnp.zeros(index.shape)], axis=1)
    position = _moved(lengths[:, None], rows.bos, shift)[:, 0]
    keys = jnp.concatenate([places, _moved(index, rows.bos, shift)], axis=1) if windowed else None
    return Cells(lengths + places.shape[1], position, bias, keys)


def make_step_layout(config: ModelConfig, cells: Cells, length: int) -> Layout:
    """Layout of `length` more text tokens a row, behind the filled cells of its cache."""
    ahead = jnp.arange(length, dtype=jnp.int32)[None]
    query = cells.position[:, None] + ahead
    cell = jnp.arange(cells.bias.shape[1], dtype=jnp.int32)[None, None]
    seen = cell <= (cells.filled[:, None] + ahead)[:, :, None]
    bias = jnp.where(seen, cells.bias[:, None], MASKED)
    return _layout(config, bias, query, query if cells.places is None else cells.places, cells.filled)


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
    q, k, v = keep(grouped), keep(k), keep(v)
    if lead is None:
        out = _softmax_product(q, k, v, bias)
    else:
        masks = ((begin, end, None if bias is None else bias[:, :, begin:end, :end]) for begin, end in _blocks(length, lead))
        outs = [_softmax_product(q[:, :, :, begin:end], k[:, :, :end], v[:, :, :end], mask) for begin, end, mask in masks]
        out = jnp.concatenate(outs, axis=3)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)


def _blocks(length: int, lead: int) -> list[tuple[int, int]]:
    """Queries [begin, end) of each block: few, but small enough that its scores stay in a core's cache."""
    size = BLOCK * max(1, -(-length // (BLOCK * MOST_BLOCKS)))
    edges = [0, *range(-(-(lead + 1) // size) * size, length, size), length]
    return list(pairwise(edges))


@jax.custom_vjp
def _softmax_product(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], bias: Any) -> Array:
    return _softmax_product_forward(q, k, v, bias)[0]


def _softmax_product_forward(q: Array, k: Array, v: Array, bias: Any) -> tuple[Array, tuple]:
    scores = _scores(q, k, bias)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = keep((_batched(weights.astype(v.dtype), v, 2) / total).astype(v.dtype))
    return out, (q, k, v, bias, out, keep(top + jnp.log(total)))


def _softmax_product_backward(kept: tuple, g: Array) -> tuple:
    """Gradients from the kept log-normaliser: the weights w once more, then d scores = w (g v - sum_h g out)."""
    q, k, v, bias, out, normaliser = kept
    weights = jnp.exp(_scores(q, k, bias) - normaliser)
    share = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    scores = weights * (_batched(g, v, 3) - share)
    narrow = scores.astype(q.dtype)
    own = None if bias is None else jnp.sum(scores, axis=(1, 2))[:, None]
    return (
        _batched(narrow, k, 2).astype(q.dtype),
        _pooled(narrow, q).astype(k.dtype),
        _pooled(weights.astype(g.dtype), g).astype(v.dtype),
        own,
    )


_softmax_product.defvjp(_softmax_product_forward, _softmax_product_backward)


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
            write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1))
            k, v = write(cache[0], k, slot), write(cache[1], v, slot)
        if cache is None and layout.by == "splash":
            return keep(splash_attention(q, k, v, layout.features, layout.lead)), (k, v)
        if cache is None and layout.by == "cudnn":
            own = (jnp.moveaxis(x, 1, 2) for x in (k, v))
            return keep(jax.nn.dot_product_attention(q, *own, is_causal=True, implementation="cudnn")), (k, v)
        return attention(q, k, v, bias, layout.lead if cache is None else None), (k, v)

    return attend
