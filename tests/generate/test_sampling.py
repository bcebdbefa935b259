"""Sampling against numpy: what is kept, how often it is drawn, and that a row's draw is its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.errors import MeetjaxError
from meetjax.generate import sampling
from meetjax.generate.sampling import RowSampling, Sampling

VOCAB, DRAWS = 12, 4000
LOGITS = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32) * 2
RULES = [
    Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=4), Sampling(1.0, top_p=0.7), Sampling(0.7, 5, 0.8), Sampling(1.0, 1),
    Sampling(1.0, top_p=1e-6), Sampling(1.0, top_k=99),
]  # fmt: skip
filtered, sample = (jax.jit(function) for function in (sampling.filtered, sampling.sample))


def rows_of(rules, seeds):
    return RowSampling(
        jnp.asarray([rule.temperature for rule in rules], jnp.float32),
        jnp.asarray([rule.top_k for rule in rules], jnp.int32),
        jnp.asarray([rule.top_p for rule in rules], jnp.float32),
        jnp.asarray(seeds, jnp.int32),
    )


def probabilities(logits, rule):
    """The distribution to draw from, token by token in float64: temperature, then top-k, then top-p."""
    weights = np.exp((logits - logits.max()) / rule.temperature)
    order = np.argsort(-weights, kind="stable")
    kept = order[: rule.top_k] if rule.top_k else order
    shares = weights[kept] / weights[kept].sum()
    # the smallest set whose mass reaches top_p: a token is in while the mass before it has not
    kept = kept[np.cumsum(shares) - shares < rule.top_p]
    found = np.zeros(len(weights))
    found[kept] = weights[kept] / weights[kept].sum()
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_kept_tokens_have_the_numpy_distribution(rule):
    kept = filtered(jnp.asarray(LOGITS), rows_of([rule], [0]))
    np.testing.assert_allclose(jax.nn.softmax(kept, axis=-1)[0], probabilities(LOGITS[0].astype(np.float64), rule), atol=1e-5)


def test_rows_are_filtered_by_their_own_rule():
    draw = np.random.default_rng(2)
    logits = draw.normal(size=(len(RULES), VOCAB)).astype(np.float32)
    kept = filtered(jnp.asarray(logits), rows_of(RULES, range(len(RULES))))
    for row, rule in enumerate(RULES):
        expected = probabilities(logits[row].astype(np.float64), rule)
        np.testing.assert_allclose(jax.nn.softmax(kept, axis=-1)[row], expected, atol=1e-5)


@pytest.mark.parametrize("rule", [Sampling(0.7), Sampling(1.0, 5, 0.8)], ids=str)
def test_draws_follow_the_distribution(rule):
    """As many rows as draws, each with a seed of its own: every frequency within five standard errors, nothing outside the kept."""
    drawn = sample(jnp.asarray(np.repeat(LOGITS, DRAWS, axis=0)), rows_of([rule] * DRAWS, range(DRAWS)), jnp.int32(3))
    frequency = np.bincount(drawn, minlength=VOCAB) / DRAWS
    expected = probabilities(LOGITS[0].astype(np.float64), rule)
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12).all()


def test_draws_over_steps_follow_the_distribution():
    """One row over many steps draws from the same distribution, so steps do not repeat each other."""
    rule, rows = Sampling(1.0), rows_of([Sampling(1.0)], [7])
    drawn = jax.vmap(lambda step: sample(jnp.asarray(LOGITS), rows, step)[0])(jnp.arange(DRAWS, dtype=jnp.int32))
    expected = probabilities(LOGITS[0].astype(np.float64), rule)
    frequency = np.bincount(drawn, minlength=VOCAB) / DRAWS
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12).all()


def test_greedy_takes_the_first_of_the_best():
    """As argmax does, ties and infinities included; of what is no number, some token of the vocabulary."""
    logits = np.random.default_rng(0).integers(-3, 3, (6, 50)).astype(np.float32)
    logits[4], logits[5, 3:] = -np.inf, np.nan
    rows = RowSampling(jnp.zeros(6), jnp.zeros(6, jnp.int32), jnp.ones(6), jnp.zeros(6, jnp.int32))
    found = np.asarray(sampling.sample(logits, rows, jnp.int32(0)))
    np.testing.assert_array_equal(found[:5], logits[:5].argmax(1))
    assert 0 <= found[5] < 50


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    draw = np.random.default_rng(3)
    logits = jnp.asarray(draw.normal(size=(64, VOCAB)), jnp.float32)
    rules = [Sampling() if row % 2 else Sampling(1.5) for row in range(64)]
    drawn = np.asarray(sample(logits, rows_of(rules, range(64)), jnp.int32(0)))
    best = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(drawn[1::2], best[1::2])
    assert (drawn[::2] != best[::2]).any()
    np.testing.assert_array_equal(sample(logits, rows_of([Sampling()] * 64, range(64)), jnp.int32(0)), best)


def test_a_draw_depends_on_seed_and_step_alone():
    """Not on the row's place, nor on the seeds and rules of its company."""
    draw = np.random.default_rng(4)
    logits = jnp.asarray(draw.normal(size=(16, VOCAB)), jnp.float32)
    rules = [RULES[row % len(RULES)] for row in range(16)]
    rows, order = rows_of(rules, range(100, 116)), draw.permutation(16)
    together = np.asarray(sample(logits, rows, jnp.int32(5)))
    shuffled = sample(logits[order], jax.tree.map(lambda leaf: leaf[order], rows), jnp.int32(5))
    np.testing.assert_array_equal(shuffled, together[order])
    alone = [sample(logits[r : r + 1], jax.tree.map(lambda leaf: leaf[r : r + 1], rows), jnp.int32(5))[0] for r in range(16)]  # noqa: B023
    np.testing.assert_array_equal(alone, together)
    assert (np.asarray(sample(logits, rows, jnp.int32(6))) != together).any()
    assert (np.asarray(sample(logits, rows_of(rules, range(200, 216)), jnp.int32(5))) != together).any()


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", INF), ("temperature", NAN), ("top_k", -1), ("top_k", 2**31), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_bad_settings_raise(name, value):
    with pytest.raises(MeetjaxError, match=f"sampling: {name}"):
        Sampling(**{name: value})
