"""Scale, stack, mix and merge say the same as gates do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.algebra import apart, at_strength, fold, merge, mix, scale, stack
from meetjax.adapters.tree import KINDS, Bank, columns
from meetjax.errors import MeetjaxError
from meetjax.models.layers import head_rewards
from tests.conftest import BATCH, TOKENS, VARIANTS, assert_close, assert_differs, quick_forward, random_bank, random_params, take

MERGED = 1e-5
"""Merging adds the adapter to the weight before the product and not after it: one float32 rounding more a weight."""
INSIDE = ("lora", "edit")


def every_row(gates):
    return np.tile(np.array(gates, np.float32), (BATCH, 1))


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tied", "qwen2"], ids=["without biases", "with biases"])
def test_merged_equals_unmerged(name):
    config = VARIANTS[name]
    params, bank, gates = random_params(config), random_bank(config, INSIDE), [0.7, -0.4]
    unmerged = np.asarray(quick_forward(config, params, TOKENS, bank, every_row(gates)))
    merged_config, merged = merge(config, params, bank, gates)
    assert merged_config.biases == ("down", "k", "o", "q", "v")
    bound = MERGED * max(1.0, np.abs(unmerged).max())
    np.testing.assert_allclose(quick_forward(merged_config, merged, TOKENS), unmerged, rtol=0, atol=bound)
    assert_differs(unmerged, quick_forward(config, params, TOKENS))


@pytest.mark.parametrize("kind", INSIDE)
def test_rank_concat_equals_merged(base, kind):
    """Two adapters side by side under gates are the weight W + sum_e g_e delta_e."""
    config, params, _ = base
    bank, gates = random_bank(config, (kind,)), [0.7, -0.4]
    merged_config, merged = merge(config, params, bank, gates)
    assert_close(quick_forward(merged_config, merged, TOKENS), quick_forward(config, params, TOKENS, bank, every_row(gates)))


def test_merge_without_gates_is_one_everywhere(base):
    config, params, _ = base
    bank = random_bank(config, INSIDE)
    jax.tree.map(np.testing.assert_array_equal, merge(config, params, bank), merge(config, params, bank, [1.0, 1.0]))


def test_merge_keeps_the_dtype_and_leaves_the_base_alone(base):
    config, params, _ = base
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    before = jax.tree.map(np.asarray, half)
    _, merged = merge(config, half, random_bank(config, INSIDE))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, half))


@pytest.mark.parametrize("kind", ["prompt", "identity", "reward"])
def test_merge_refuses_what_is_not_linear(base, kind):
    config, params, _ = base
    assert kind in error_of(lambda: merge(config, params, random_bank(config, (kind,))))


def test_scale_is_a_gate(base):
    config, params, _ = base
    bank = take(random_bank(config, INSIDE), 0)
    assert_close(quick_forward(config, params, TOKENS, scale(bank, -0.6)), quick_forward(config, params, TOKENS, bank, every_row([-0.6])))


@pytest.mark.parametrize("kind", ["prompt", "identity"])
def test_scale_refuses_prompts_and_blocks(base, kind):
    bank = random_bank(base[0], (kind,))
    message = error_of(lambda: scale(bank, 0.5))
    assert kind in message and "gates" in message
    jax.tree.map(np.testing.assert_array_equal, scale(bank, 1), bank)


def test_reward_heads_scale_stack_and_mix_like_gates(base):
    one, two = (take(random_bank(base[0], ("reward",)), row) for row in (0, 1))
    both = stack([one, two])
    assert both.reward.entries == (0, 1) and both.reward.u.shape == (2, base[0].width)
    mixed = mix([one, two], [0.5, -2.0])
    assert mixed.reward.entries == (0, 0)
    h = np.random.default_rng(2).normal(size=(BATCH, 3, base[0].width)).astype(np.float32)
    expected = head_rewards(h, both.reward, every_row([0.5, -2.0]))
    assert_close(head_rewards(h, mixed.reward, np.ones((1, 2), np.float32)), expected)
    assert_close(expected, 0.5 * h @ one.reward.u[0] - 2 * h @ two.reward.u[0])


def small_and_large(config):
    """Two banks that agree in nothing: rank, prompt length, sites, LoRA scale, number of adapters."""
    small = random_bank(config, entries=(0,), rank=1, length=2, linear=("q", "down"), editable=("down",), seed=4)
    large = random_bank(config, entries=(0, 1), rank=3, length=5, linear=("v", "down"), editable=("k", "down"), seed=5)
    return small, dataclasses.replace(large, lora=dataclasses.replace(large.lora, scale=0.5))


def test_stack_pads_neutrally(base):
    """Each gate column of a stack acts as its bank alone, ranks, lengths and sites padded."""
    config, params, _ = base
    small, large = small_and_large(config)
    both = stack([small, large])
    assert columns(both) == 3
    assert both.prompt.vectors.shape == (3, 5, config.width)
    assert both.lora.down.a.shape[1::2] == (3, 3) and both.lora.q is not None and both.lora.v is not None and both.lora.k is None
    assert both.edit.k.s.shape[1] == 3
    gates = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    logits = np.asarray(quick_forward(config, params, TOKENS, both, gates))
    for rows, alone in (([0, 3], small), ([1], take(large, 0)), ([2], take(large, 1))):
        assert_close(logits[rows], np.asarray(quick_forward(config, params, TOKENS, alone))[rows])


def test_stack_of_different_kinds(base):
    config, params, _ = base
    lora, edit = (take(random_bank(config, (kind,)), 0) for kind in INSIDE)
    both = stack([lora, edit])
    assert (both.lora.entries, both.edit.entries, both.prompt, both.identity) == ((0,), (1,), None, None)
    gates = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    logits = np.asarray(quick_forward(config, params, TOKENS, both, gates))
    assert_close(logits[0::2], np.asarray(quick_forward(config, params, TOKENS, lora))[0::2])
    assert_close(logits[1::2], np.asarray(quick_forward(config, params, TOKENS, edit))[1::2])


def test_stack_refuses_nothing_and_other_models(base):
    config = base[0]
    assert "no bank" in error_of(lambda: stack([]))
    wider = dataclasses.replace(config, width=64, heads=8, kv_heads=4)
    for kind in KINDS:
        assert kind in error_of(lambda kind=kind: stack([random_bank(config, (kind,)), random_bank(wider, (kind,))]))


def test_stack_refuses_other_models_that_share_no_site(base):
    config = base[0]
    deeper = dataclasses.replace(config, layers=config.layers + 1)
    for kind, field in (("lora", "linear"), ("edit", "editable")):
        banks = [random_bank(c, (kind,), **{field: (site,)}) for c, site in ((config, "q"), (deeper, "v"))]
        assert kind in error_of(lambda banks=banks: stack(banks))


def test_mix_equals_gates(base):
    """One column of w1 bank1 + w2 bank2 is the stack under gates [w1, w2], and the gate of the mix scales it."""
    config, params, _ = base
    banks, weights = [take(random_bank(config, INSIDE), row) for row in (0, 1)], [0.7, -0.4]
    mixed = mix(banks, weights)
    assert columns(mixed) == 1
    by_gates = np.asarray(quick_forward(config, params, TOKENS, stack(banks), every_row(weights)))
    assert_close(quick_forward(config, params, TOKENS, mixed, every_row([1.0])), by_gates)
    half = quick_forward(config, params, TOKENS, stack(banks), every_row([0.35, -0.2]))
    assert_close(quick_forward(config, params, TOKENS, mixed, every_row([0.5])), half)


def test_mix_refuses_the_wrong_number_of_weights(base):
    bank = random_bank(base[0], ("edit",))
    assert "expected 1" in error_of(lambda: mix([bank], [0.5, 0.5]))


def test_mix_is_linear_in_the_merged_delta(base):
    """merge(mix) - base = w1 (merge(bank1) - base) + w2 (merge(bank2) - base), for LoRA and for edits."""
    config, params, _ = base
    for kind in INSIDE:
        banks, weights = [take(random_bank(config, (kind,)), row) for row in (0, 1)], [0.7, -0.4]
        _, merged = merge(config, params, mix(banks, weights))
        parts = [merge(config, params, bank)[1]["blocks"] for bank in banks]
        for name, leaf in merged["blocks"].items():
            origin = params["blocks"].get(name, jnp.zeros_like(leaf))
            assert_close(leaf - origin, sum(w * (part[name] - origin) for w, part in zip(weights, parts, strict=True)))


def test_a_bank_of_nothing():
    assert columns(Bank()) == 0 and columns(stack([Bank(), Bank()])) == 0


@pytest.mark.parametrize(("kinds", "gates"), [(("lora",), (0.7, -0.4)), (("edit",), (0.7, -0.4)), (("prompt", "lora", "edit"), (0.0, 1.0))])
def test_folded_equals_gated(base, kinds, gates):
    """One adapter a kind, without gates, is the bank under them; a soft prompt's empty slots are gone."""
    config, params, _ = base
    bank = random_bank(config, kinds)
    folded = fold(bank, gates)
    assert columns(folded) == 1
    assert_close(quick_forward(config, params, TOKENS, folded), quick_forward(config, params, TOKENS, bank, every_row(gates)))
    assert folded.prompt is None or folded.prompt.vectors.shape[:2] == (1, 3)


def test_columns_apart_are_the_bank_under_one_gate(base):
    config, params, _ = base
    bank = random_bank(config)
    for column, own in enumerate(apart(bank)):
        gates = every_row(np.eye(columns(bank))[column])
        assert columns(own) == 1
        assert_close(quick_forward(config, params, TOKENS, own), quick_forward(config, params, TOKENS, bank, gates))


def test_each_column_has_its_own_strength(base):
    config, _, _ = base
    for kind in ("prompt", "lora"):
        two, (_, one) = random_bank(config, (kind,)), apart(random_bank(config, (kind,)))
        assert at_strength(two, 0.0, 1.0) == ((0.0, 1.0), None)
        assert at_strength(one, 0.5) == (((1.0,), 0.5) if kind == "prompt" else ((0.5,), None))
        assert "expected 2, one for each gate column of the adapter; found 1; 0 for all but one" in error_of(
            lambda two=two: at_strength(two, 1.0)
        )


def test_what_has_no_single_adapter_is_not_folded(base):
    config, _, _ = base
    for gates in ((0.5, 0.0), (1.0, 1.0)):
        assert "expected one at strength 1" in error_of(lambda gates=gates: fold(random_bank(config, ("prompt",)), gates))
    assert fold(random_bank(config, ("prompt",)), (0.0, 0.0)) == Bank()
    assert "identity" in error_of(lambda: fold(random_bank(config, ("identity",)), (1.0, 1.0)))
