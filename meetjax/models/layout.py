"""Who attends to whom: positions, masks, soft-prompt gates and the cache, computed once for all layers.

Soft-prompt columns stand first in the array whatever their place in the text. In meaning the prompt follows a leading BOS
token (BOS keeps position 0, where models park attention) and precedes everything else, so a row's text moves by the length
of the longest prompt that is on for that row: with gate 0 the row is the base model's, positions included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.models.layers import rope_angles
from meetjax.models.splash import split
from meetjax.types import Array

MASKED = -1e30
"""Added to a forbidden score: its softmax weight is exactly 0, and a row with nothing to attend to stays finite."""


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
