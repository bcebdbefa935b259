"""Decoding: left-padded prefill and one-token steps against a cache say what one pass over the whole text says."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from meetjax.models import layers
from meetjax.models.decoder import decode_step, prefill, unstack
from tests.conftest import (
    BATCH,
    DIAL,
    KINDS_ALONE,
    KINDS_TOGETHER,
    LENGTH,
    QUICK,
    TOKENS,
    apart,
    assert_close,
    assert_differs,
    quick_forward,
    random_bank,
)

PAD = np.array([0, 2, 1, 4], np.int32)
PROMPT, CAPACITY = 6, 12
"""Prompts of 6 columns, left padding included; the cache keeps 3 slots that no token ever fills."""

quick_prefill = jax.jit(prefill, static_argnums=(0, 4), compiler_options=QUICK)
quick_step = jax.jit(decode_step, static_argnums=0, compiler_options=QUICK)


def decode_all(config, params, bank, gates, dial, filler=0):
    """Logits [B, 4, V] after the prompt and after each of three further tokens, row b's text being TOKENS[b, : 9 - PAD[b]]."""
    layout = np.stack([np.concatenate([np.full(n, filler), row[: LENGTH - n]]) for row, n in zip(TOKENS, PAD, strict=True)]).astype(
        np.int32
    )
    flat = unstack(params)
    h, cache = quick_prefill(config, flat, layout[:, :PROMPT], PAD, CAPACITY, bank, gates, dial)
    steps = [h]
    for column in range(PROMPT, LENGTH):
        h, cache = quick_step(config, flat, layout[:, column], cache, bank, gates, dial)
        steps.append(h)
    assert int(cache.slot) == LENGTH
    return np.asarray(layers.logits(params, np.stack(steps, axis=1)))


def at_the_same_tokens(logits):
    """Of right-padded logits [B, 9, V], those after each row's prompt and three further tokens."""
    places = np.arange(PROMPT - 1, LENGTH)[None] - PAD[:, None]
    return np.take_along_axis(np.asarray(logits), places[:, :, None], axis=1)


@pytest.mark.parametrize("gates", [KINDS_ALONE, KINDS_TOGETHER], ids=["alone", "together"])
def test_prefill_plus_decode_equals_full_forward(variant, gates):
    """Every kind, alone on a row and mixed, behind left padding, with a gate and a dial a row."""
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
    cache = jax.eval_shape(lambda: prefill(config, unstack(params), TOKENS, PAD, CAPACITY, deep)[1])
    assert sorted(cache.identity) == ["0.0", "0.1"]
    assert all(leaf.shape == (BATCH, config.kv_heads, CAPACITY, config.head_width) for leaf in jax.tree.leaves(cache.identity))
