"""Merging of weights: ends, identities and means hold, LoRA goes by its product, and misfits are told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meetjax.adapters.algebra import merge
from meetjax.adapters.merging import dare, dare_ties, linear, lora_delta, merge_delta, slerp, ties, to_lora
from meetjax.adapters.tree import Bank
from meetjax.errors import MeetjaxError
from tests.conftest import TINY, TOKENS, assert_close, assert_differs, quick_forward, random_bank, random_params, take

FLOAT = 1e-6
"""Relative: one or two roundings of float32 in numbers of order 1."""
SHAPES = {"w": (3, 4), "norm": (5,), "bias": (1,)}
seeds, fractions = st.integers(0, 2**16), st.floats(0, 1)


def tree(seed, dtype=np.float32):
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def close(left, right, tolerance=FLOAT):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance, tolerance), left, right
    )


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=10)
@given(seeds, fractions)
def test_linear_is_linear(seed, t):
    a, b = tree(seed), tree(seed + 1)
    same(linear([a, b], [1, 0]), a)
    close(linear([a, b], [t, 1 - t]), jax.tree.map(lambda x, y: t * x + (1 - t) * y, a, b))
    close(linear([linear([a, b], [1, -1]), b], [1, 1]), a, 10 * FLOAT)


@settings(max_examples=10)
@given(seeds, fractions)
def test_slerp_laws(seed, t):
    """Ends to the bit, symmetric, and on the arc: the angle to a is t W, and equal norms are kept."""
    a, b = tree(seed), tree(seed + 1)
    same(slerp(a, b, 0.0), a)
    same(slerp(a, b, 1.0), b)
    close(slerp(a, b, t), slerp(b, a, 1 - t), 10 * FLOAT)
    p, q = (np.asarray(x["w"], np.float64).ravel() / np.linalg.norm(x["w"]) for x in (a, b))
    found = np.asarray(slerp(jnp.float32(p), jnp.float32(q), t), np.float64)
    angle = np.arccos(p @ q)
    np.testing.assert_allclose([found @ p, found @ q], [np.cos(t * angle), np.cos((1 - t) * angle)], atol=10 * FLOAT)
    np.testing.assert_allclose(np.linalg.norm(found), 1, atol=10 * FLOAT)


@settings(max_examples=10)
@given(seeds, fractions)
def test_slerp_without_an_arc_is_the_line(seed, t):
    a = tree(seed)
    same(slerp(a, a, t), a)
    for factor in (2.0, -1.0, -0.5, 0.0):
        b = jax.tree.map(lambda x, factor=factor: factor * x, a)
        close(slerp(a, b, t), jax.tree.map(lambda x, y: (1 - t) * x + t * y, a, b))
        same(slerp(a, b, 0.0), a)
        same(slerp(a, b, 1.0), b)
    zero = jax.tree.map(jnp.zeros_like, a)
    same(slerp(zero, zero, t), zero)


def test_slerp_of_a_small_angle_is_exact():
    """The arccosine of a float32 product is 0 here, and 8 degrees off elsewhere."""
    p, q = jnp.float32([1, 0]), jnp.float32([1, 1e-4])
    np.testing.assert_allclose(slerp(p, q, 0.25), [1, 0.25e-4], rtol=1e-5)


def test_dare_keeps_the_mean_and_drops_as_often_as_told():
    delta, drop, count = tree(0), 0.7, 4000
    drawn = jax.vmap(lambda key: dare(delta, key, drop))(jax.random.split(jax.random.key(0), count))
    for name, leaf in delta.items():
        kept = np.asarray(drawn[name]) != 0
        sigma = np.sqrt(drop / (1 - drop) / count)  # of the mean, as a fraction of the entry
        np.testing.assert_array_less(np.abs(drawn[name].mean(0) / leaf - 1), 5 * sigma)
        np.testing.assert_allclose(drawn[name][kept], np.broadcast_to(leaf / (1 - drop), kept.shape)[kept], rtol=FLOAT)
        assert abs(kept.mean() - (1 - drop)) < 5 * np.sqrt(drop * (1 - drop) / kept.size)


def test_dare_draws_each_leaf_and_entry_by_itself():
    ones = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    drawn = dare(ones, jax.random.key(1), 0.5)
    both = np.stack([np.asarray(drawn[name]).ravel() > 0 for name in "ab"])
    assert abs(np.corrcoef(both)[0, 1]) < 0.1
    same(dare(ones, jax.random.key(1), 0.5), drawn)
    same(dare(tree(3), jax.random.key(1), 0.0), tree(3))


def by_hand(deltas, weights, density):
    """TIES of flat vectors in plain loops; no two entries of a vector are of one size."""
    out = []
    trimmed = []
    for delta in deltas:
        kept = max(1, round(density * len(delta)))
        largest = sorted(range(len(delta)), key=lambda i, delta=delta: -abs(delta[i]))[:kept]
        trimmed.append([x if i in largest else 0.0 for i, x in enumerate(delta)])
    for column in zip(*trimmed, strict=True):
        positive = sum(w * x for w, x in zip(weights, column, strict=True)) >= 0
        agreeing = [(w, x) for w, x in zip(weights, column, strict=True) if x and w and (x > 0) == positive]
        out.append(sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0)
    return out


@settings(max_examples=20)
@given(seeds, st.lists(st.floats(0.1, 3), min_size=1, max_size=4), st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_ties_is_trim_elect_mean(seed, weights, density):
    deltas = [tree(seed + i) for i in range(len(weights))]
    merged = ties(deltas, weights, density)
    for name, leaf in merged.items():
        flat = [np.asarray(delta[name], np.float64).ravel().tolist() for delta in deltas]
        np.testing.assert_allclose(np.asarray(leaf).ravel(), by_hand(flat, weights, density), rtol=4 * FLOAT, atol=FLOAT)
    close(ties(deltas[::-1], weights[::-1], density), merged)
    close(ties(deltas, [2 * w for w in weights], density), merged)
    close(ties([deltas[0]] * 3, [1, 2, 3], 1.0), deltas[0])
    same(ties(deltas[:1], [1.0], 1.0), deltas[0])


def test_ties_keeps_what_is_as_large_as_the_last_one_kept():
    delta = jnp.float32([3, -2, 2, 1])
    np.testing.assert_array_equal(ties([delta], [1], 0.5), [3, -2, 2, 0])


def test_dare_ties_is_ties_of_the_drawn():
    deltas, key = [tree(0), tree(1)], jax.random.key(2)
    drawn = [dare(delta, jax.random.fold_in(key, i), 0.5) for i, delta in enumerate(deltas)]
    same(dare_ties(deltas, [1, 2], key, 0.5), ties(drawn, [1, 2], 1.0))
    same(dare_ties(deltas, [1, 2], key, 0.0), ties(deltas, [1, 2], 1.0))


@pytest.mark.parametrize("kind", ["edit", "prompt"])
def test_edits_and_prompts_merge_leaf_by_leaf(kind):
    a, b = (random_bank(TINY, (kind,), entries=(0,), seed=seed) for seed in (1, 2))
    close(linear([a, b], [0.5, 0.5]), jax.tree.map(lambda x, y: (x + y) / 2, a, b))
    same(slerp(a, b, 1.0), b)
    assert jax.tree.structure(ties([a, b], [1, 1], 0.5)) == jax.tree.structure(a)


def test_weights_keep_their_dtype():
    base, left, right = (tree(seed, jnp.bfloat16) for seed in (0, 1, 2))
    deltas = [linear([tuned, base], [1, -1]) for tuned in (left, right)]
    merged = linear([base, ties(deltas, [1, 1], 0.5)], [1, 0.7])
    for result in (merged, slerp(left, right, 0.3), dare(left, jax.random.key(0), 0.5)):
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("bfloat16")}
        assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, base)
    assert_differs(merged["w"], base["w"])


def test_delta_of_a_lora_merges_as_the_lora_does():
    params, bank = random_params(TINY), take(random_bank(TINY, ("lora",)), 0)
    _, expected = merge(TINY, params, bank)
    found = merge_delta(params, lora_delta(bank.lora))
    jax.tree.map(lambda a, b: assert_close(a, b, factor=0.1), found, expected)


def test_to_lora_of_enough_rank_is_the_merged_weight():
    """Two LoRAs of rank 2 by weight-space mean: rank 4 says it all, and the adapter computes what the merged base computes."""
    params = random_params(TINY)
    deltas = [lora_delta(take(random_bank(TINY, ("lora",)), row).lora) for row in (0, 1)]
    mean = linear(deltas, [0.7, -0.4])
    lora, missed = to_lora(mean, 4)
    assert lora.q.a.shape == (TINY.layers, 1, TINY.width, 4) and lora.scale == 1
    assert set(missed) == set(mean) and max(missed.values()) < 10 * FLOAT
    adapted = np.asarray(quick_forward(TINY, params, TOKENS, Bank(lora=lora)))
    assert_close(quick_forward(TINY, merge_delta(params, mean), TOKENS), adapted)
    assert_differs(adapted, quick_forward(TINY, params, TOKENS))


def test_to_lora_reports_what_a_low_rank_misses():
    delta = ties([lora_delta(take(random_bank(TINY, ("lora",)), row).lora) for row in (0, 1)], [1, 1], 0.3)
    errors = []
    for rank in (1, 4, 16):
        lora, missed = to_lora(delta, rank)
        for name, leaf in lora_delta(lora).items():
            found = np.linalg.norm(np.asarray(leaf - delta[name])) / np.linalg.norm(np.asarray(delta[name]))
            assert abs(found - missed[name]) < 10 * FLOAT
        errors.append(missed["q"])
    assert 1 > errors[0] > errors[1] > errors[2] > 0.01
    assert to_lora({"q": jnp.zeros((2, 4, 4))}, 1)[1] == {"q": 0.0}


def test_factors_of_a_lora_are_refused():
    bank = take(random_bank(TINY), 0)
    cases = (
        lambda: linear([bank, bank], [0.5, 0.5]),
        lambda: slerp(bank.lora, bank.lora, 0.5),
        lambda: dare({"mine": bank.lora.q}, jax.random.key(0), 0.5),
        lambda: ties([bank.lora], [1], 0.5),
    )
    for case in cases:
        assert "factors of a LoRA" in error_of(case) and "lora_delta" in error_of(case)


def test_misfits_are_told():
    a, key = tree(0), jax.random.key(0)
    bank = random_bank(TINY, ("lora",))
    cases = {
        "one a tree; found 1": lambda: linear([a, a], [1]),
        "one or more": lambda: linear([], []),
        "finite": lambda: linear([a], [float("nan")]),
        "one structure": lambda: slerp(a, {"w": a["w"]}, 0.5),
        "shape of norm; expected (5,); found (6,)": lambda: ties([a, a | {"norm": jnp.ones(6)}], [1, 1], 1.0),
        "shape of vectors": lambda: linear([random_bank(TINY, ("prompt",), length=n).prompt for n in (2, 3)], [1, 1]),
        "drop; expected at least 0": lambda: dare(a, key, 1.0),
        "drop": lambda: dare(a, key, -0.1),
        "density; expected more than 0": lambda: ties([a], [1], 0.0),
        "density": lambda: ties([a], [1], 1.5),
        "none negative": lambda: ties([a, a], [1, -1], 0.5),
        "one positive": lambda: ties([a], [0], 0.5),
        "a bank of 2": lambda: lora_delta(bank.lora),
        "merge_delta: q; expected (3, 4, 4); found (3, 32, 32)": lambda: merge_delta(random_params(TINY), {"q": jnp.ones((3, 4, 4))}),
        "merge_delta: nose": lambda: merge_delta(random_params(TINY), {"nose": jnp.ones((3, 4, 4))}),
        "rank at q; expected 1 to 4; found 5": lambda: to_lora({"q": jnp.ones((3, 4, 6))}, 5),
        "unknown site nose": lambda: to_lora({"nose": jnp.ones((3, 4, 6))}, 1),
        "no site given": lambda: to_lora({}, 1),
    }
    for what, case in cases.items():
        assert what in error_of(case)
