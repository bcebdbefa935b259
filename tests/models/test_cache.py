"""Decoding: a prefill and steps of one or more tokens against a cache say what one pass over the whole text says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.tree import columns
from meetjax.models import layers
from meetjax.models.bits import write_cells
from meetjax.models.decoder import decode_step, extend, prefill, unstack
from tests.conftest import (
    BATCH,
    DIAL,
    KINDS_ALONE,
    KINDS_TOGETHER,
    LENGTH,
    MOVING,
    TOKENS,
    apart,
    assert_close,
    assert_differs,
    quick_forward,
    random_bank,
)

LENGTHS = np.array([6, 4, 5, 2], np.int32)
PROMPT, CAPACITY = 6, 12
"""Prompts of at most 6 tokens; three more follow, and the cache keeps cells that no token ever fills."""

quick_prefill = jax.jit(prefill, static_argnums=(0, 4))
quick_step = jax.jit(decode_step, static_argnums=0)
quick_extend = jax.jit(extend, static_argnums=0)


def padded(starts, lengths, width, filler=0):
    """int32[B, width]: of each row of TOKENS `lengths` tokens from `starts` on, then filler."""
    cut = [row[start : start + n] for row, start, n in zip(TOKENS, starts, lengths, strict=True)]
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=filler) for row in cut])


def decode_all(config, params, bank, gates, dial, filler=0):
    """Logits [B, 4, V] after the prompt and after each of three further tokens, row b's prompt being TOKENS[b, : LENGTHS[b]]."""
    flat = unstack(params)
    h, cache = quick_prefill(config, flat, padded(0 * LENGTHS, LENGTHS, PROMPT, filler), LENGTHS, CAPACITY, bank, gates, dial)
    steps, columns = [h], cache.blocks[0][0].shape[2] - CAPACITY
    for n in range(3):
        h, cache = quick_step(config, flat, TOKENS[np.arange(BATCH), LENGTHS + n], cache, bank, gates, dial)
        steps.append(h)
    filled = np.asarray(cache.cells.filled).reshape(BATCH, -1)
    np.testing.assert_array_equal(filled, np.broadcast_to(columns + LENGTHS[:, None] + 3, filled.shape))
    return np.asarray(layers.logits(params, np.stack(steps, axis=1)))


def at_the_same_tokens(logits):
    """Of right-padded logits [B, 9, V], those after each row's prompt and three further tokens."""
    places = LENGTHS[:, None] - 1 + np.arange(4)[None]
    return np.take_along_axis(np.asarray(logits), places[:, :, None], axis=1)


@pytest.mark.parametrize("gates", [KINDS_ALONE, KINDS_TOGETHER], ids=["alone", "together"])
def test_prefill_plus_decode_equals_full_forward(variant, gates):
    """Every kind, alone on a row and mixed, rows of unequal length, with a gate and a dial a row."""
    config, params = variant
    bank = apart(random_bank(config))
    whole = at_the_same_tokens(quick_forward(config, params, TOKENS, bank, gates, dial=DIAL))
    assert_close(decode_all(config, params, bank, gates, DIAL), whole)


@pytest.mark.parametrize("kinds", [(), ("prompt",), ("identity",)], ids=["base", "prompt", "identity"])
def test_prefill_plus_decode_equals_full_forward_without_gates(base, kinds):
    """The programs with fewer parts: no bank, prompt columns alone, one stream alone."""
    config, params, _ = base
    bank = random_bank(config, kinds, entries=(0,)) if kinds else None
    whole = at_the_same_tokens(quick_forward(config, params, TOKENS, bank))
    assert_close(decode_all(config, params, bank, None, None), whole)


@pytest.mark.parametrize("kind", [*MOVING, "all"])
def test_a_chunk_equals_its_tokens_one_by_one(variant, kind):
    """`extend` by 3 tokens, of which rows use 3, 2, 1 and 2, and then one more token: the cells of the rest are filled anew."""
    config, params = variant
    bank = apart(random_bank(config, MOVING if kind == "all" else (kind,)))
    gates = np.random.default_rng(4).uniform(0, 1.2, (BATCH, columns(bank))).astype(np.float32)
    dial = DIAL if kind == "all" else None
    used, flat = np.array([3, 2, 1, 2], np.int32), unstack(params)
    _, cache = quick_prefill(config, flat, padded(0 * LENGTHS, LENGTHS, PROMPT), LENGTHS, CAPACITY, bank, gates, dial)
    chunk, cache = quick_extend(config, flat, padded(LENGTHS, used, 3, 5), cache, bank, gates, dial, lengths=used)
    # The first row has no token left; it takes its first again, and is not looked at.
    more, _ = quick_step(config, flat, TOKENS[np.arange(BATCH), (LENGTHS + used) % LENGTH], cache, bank, gates, dial)
    whole = np.asarray(quick_forward(config, params, TOKENS, bank, gates, dial=dial))
    rows, ends = np.arange(BATCH), LENGTHS + used - 1
    assert_close(layers.logits(params, chunk), whole[rows, ends])
    assert_close(layers.logits(params, more)[1:], whole[rows[1:], ends[1:] + 1])


@pytest.mark.parametrize("gates", [KINDS_ALONE, KINDS_TOGETHER], ids=["alone", "together"])
def test_a_row_is_one_stream_where_that_is_asked_for(base, gates):
    """`enters`: the streams of a row as rows of their own, mixed behind the last block, say what the dial of identity blocks says."""
    config, params, _ = base
    bank = apart(random_bank(config))
    flat, first = unstack(params), padded(0 * LENGTHS, LENGTHS, PROMPT)
    hidden = []
    for block in (0, 1, -1):
        enters = np.full(BATCH, block, np.int32)
        h, cache = quick_prefill(config, flat, first, LENGTHS, CAPACITY, bank, gates, None, enters)
        more, _ = quick_extend(config, flat, TOKENS[np.arange(BATCH), LENGTHS][:, None], cache, bank, gates, enters=enters)
        hidden.append(np.stack([h, more], axis=1))
    own = [gates[:, entry, None, None] for entry in bank.identity.entries]
    mixed = sum(g * h for g, h in zip([*own, 1 - sum(own)], hidden, strict=True))
    assert_close(layers.logits(params, mixed), at_the_same_tokens(quick_forward(config, params, TOKENS, bank, gates))[:, :2])


def test_padding_never_reaches_the_cache_readers(base):
    config, params, _ = base
    bank = apart(random_bank(config))
    runs = [decode_all(config, params, bank, KINDS_TOGETHER, DIAL, filler) for filler in (0, 1)]
    np.testing.assert_array_equal(*runs)


def test_two_identity_blocks_have_a_cache_each(base):
    config, params, _ = base
    bank = random_bank(config, ("identity",), entries=(0,))
    two = {name: np.concatenate([leaf, 0.5 * leaf]) for name, leaf in bank.identity.block.items()}
    deep = dataclasses.replace(bank, identity=dataclasses.replace(bank.identity, block=two))
    whole = at_the_same_tokens(quick_forward(config, params, TOKENS, deep))
    assert_close(decode_all(config, params, deep, None, None), whole)
    assert_differs(whole, at_the_same_tokens(quick_forward(config, params, TOKENS, bank)))
    cache = jax.eval_shape(lambda: prefill(config, unstack(params), TOKENS, LENGTHS, CAPACITY, deep)[1])
    assert sorted(cache.identity) == ["0.0", "0.1"]
    assert all(leaf.shape == (BATCH, config.kv_heads, CAPACITY, config.head_width) for leaf in jax.tree.leaves(cache.identity))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [1, 3])
def test_every_row_writes_its_own_cells(dtype, length):
    """To the bit, also where bfloat16 is written in another way, and nothing else moves."""
    draw, slot = np.random.default_rng(0), np.array([0, 4, 2], np.int32)
    cache = jnp.asarray(draw.normal(size=(3, 2, 7, 4)), dtype)
    new = jnp.asarray(draw.normal(size=(3, 2, length, 4)), dtype)
    found = jax.jit(write_cells)(cache, new, slot)
    expected = np.array(cache)
    for row, at in enumerate(slot):
        expected[row, :, at : at + length] = np.asarray(new)[row]
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), expected)
