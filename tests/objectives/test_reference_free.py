"""ORPO, SimPO and CPO: values known by hand, the extremes of the odds, and that they need no reference."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.reference_free import CERTAIN, Cpo, Orpo, Simpo, log_odds, orpo_loss
from meetjax.types import Batch

FAMILY = {"orpo": Orpo(0.3), "simpo": Simpo(2.5, 0.4), "cpo": Cpo(0.2, 0.7)}
EVERY = pytest.mark.parametrize("name", FAMILY)
DRAW = np.random.default_rng(1)
TOKENS = DRAW.integers(1, 30, (8, 2)).astype(np.int32)
LOGPS = (-TOKENS * DRAW.uniform(0.05, 4, (8, 2))).astype(np.float32)
SMALL = 1e-5
"""Float32 sums of terms up to 100 nats: relative to the larger of 1 and the value."""


def softplus(x):
    return np.logaddexp(0.0, x)


FORMULAS = {  # of the sums (s_w, s_l) = (c, r) and lengths (m, n), in float64; log(e^a / (1 - e^a)) is the log-odds as it is written
    "orpo": lambda c, r, m, n: -c / m + 0.3 * softplus(np.log(np.expm1(-c / m)) - np.log(np.expm1(-r / n))),
    "simpo": lambda c, r, m, n: softplus(1.0 - 2.5 * (c / m - r / n)),
    "cpo": lambda c, r, m, n: softplus(-0.2 * (c - r)) - 0.7 * c / m,
}
REWARDS = {
    "orpo": lambda s, n: -0.3 * np.log(np.expm1(-s / n)),
    "simpo": lambda s, n: 2.5 * s / n,
    "cpo": lambda s, n: 0.2 * s,
}


def make_batch(tokens=TOKENS, weights=None):
    count = len(tokens)
    weights = np.ones(count, np.float32) if weights is None else weights
    starts = np.full((count, 2), 3, np.int32)
    return Batch(np.ones((count, 2, 40), np.int32), starts, starts + tokens, weights)


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=SMALL, atol=SMALL)


@EVERY
@pytest.mark.parametrize("swap", [False, True], ids=["straight", "swapped"])
def test_loss_and_rewards_equal_the_formulas_in_float64(name, swap):
    """Without a reference in the batch; swapped answers are the formula of swapped sums and lengths."""
    order = [1, 0] if swap else [0, 1]
    logps, tokens = LOGPS[:, order], TOKENS[:, order]
    assert not FAMILY[name].needs_reference
    losses, rewards = FAMILY[name].scores(jnp.asarray(logps), make_batch(tokens))
    wide = logps.astype(np.float64)
    assert_equal(losses, FORMULAS[name](*wide.T, *tokens.T))
    assert_equal(rewards, REWARDS[name](wide, tokens))


def test_equal_answers_leave_the_wanted_margin_and_the_likelihood():
    """Equal means: ORPO's odds term is lambda ln 2, SimPO is ln(1 + e^gamma). Equal sums: CPO's first term is ln 2."""
    tokens = np.array([[4, 8]], np.int32)
    means, sums = jnp.array([[-6.0, -12.0]]), jnp.array([[-6.0, -6.0]])
    assert_equal(FAMILY["orpo"].scores(means, make_batch(tokens))[0], [1.5 + 0.3 * math.log(2)])
    assert_equal(FAMILY["simpo"].scores(means, make_batch(tokens))[0], [math.log(1 + math.exp(1.0))])
    assert_equal(FAMILY["cpo"].scores(sums, make_batch(tokens))[0], [math.log(2) + 0.7 * 1.5])


def test_gradients_at_equal_answers():
    """ORPO: -1/n_w and the odds' lambda / 2 / (1 - e^a) / n. SimPO: beta sigmoid(gamma) / n. CPO: beta / 2, and alpha / n_w."""
    tokens, batch = np.array([4.0, 8.0]), make_batch(np.array([[4, 8]], np.int32))

    def pulls(name, logps):
        return jax.grad(lambda s: FAMILY[name](s, batch)[0])(jnp.asarray(logps, jnp.float32))

    signs = np.array([[-1.0, 1.0]])
    odds = 0.15 / (1 - math.exp(-1.5)) / tokens
    assert_equal(pulls("orpo", [[-6.0, -12.0]]), signs * odds - [[0.25, 0.0]])
    assert_equal(pulls("simpo", [[-6.0, -12.0]]), signs * 2.5 / (1 + math.exp(-1.0)) / tokens)
    assert_equal(pulls("cpo", [[-6.0, -6.0]]), signs * 0.1 - [[0.7 / 4, 0.0]])


@pytest.mark.parametrize("a", [-1e-9, -1e-6, -1.0001e-4, -1e-3, -0.6931, -0.6932, -1.0, -20.0, -60.0])
def test_log_odds_are_accurate_and_finite_everywhere(a):
    """Against float64 where they are not clamped; the slope 1 / (1 - e^a) is at most that of the clamp, 1e4."""
    value, slope = jax.value_and_grad(lambda x: log_odds(x)[0, 0])(jnp.full((1, 1), a, jnp.float32))
    bound = 1 / -math.expm1(CERTAIN)
    assert bound == pytest.approx(1e4, rel=1e-4)
    if a > CERTAIN:
        np.testing.assert_allclose(value, CERTAIN - math.log(-math.expm1(CERTAIN)), rtol=1e-5)
        assert slope.item() == 0.0
    else:
        np.testing.assert_allclose(value, a - math.log(-math.expm1(a)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope.item(), 1 / -math.expm1(a), rtol=1e-4)
        assert slope.item() <= bound


@pytest.mark.parametrize("chosen", [-1e-9, -1e-4, -0.7, -60.0])
@pytest.mark.parametrize("rejected", [-1e-9, -1e-4, -0.7, -60.0])
def test_odds_term_is_finite_at_every_pair_of_extremes(chosen, rejected):
    """Certain and hopeless answers on either side: the term and its gradient, at most 1e4 nats a nat."""

    def term(s):
        return orpo_loss(s, jnp.ones((1, 2), jnp.float32), 1.0)[0][0] + s[0, 0]  # without the likelihood

    value, pulls = jax.value_and_grad(term)(jnp.array([[chosen, rejected]], jnp.float32))
    assert np.isfinite(value)
    assert np.isfinite(pulls).all()
    assert np.abs(pulls).max() <= 1.0001e4
    if chosen == rejected:
        np.testing.assert_allclose(value, math.log(2), atol=SMALL)  # the likelihood that cancels is up to 60


@EVERY
def test_filled_up_rows_enter_nothing(name):
    """Rows of weight 0, empty answers among them: sums, normaliser, metrics and gradients are those of the real rows alone."""
    weights, real = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32), [0, 2, 3, 5, 6]
    tokens = np.where(weights[:, None] > 0, TOKENS, 0).astype(np.int32)
    logps = np.where(weights[:, None] > 0, LOGPS, 0).astype(np.float32)
    outcome, expected = (FAMILY[name](jnp.asarray(logps[rows]), make_batch(tokens[rows], weights[rows])) for rows in (range(8), real))
    jax.tree.map(assert_equal, outcome, expected)
    assert outcome[1] == 5
    pulls = jax.grad(lambda s: FAMILY[name](s, make_batch(tokens, weights))[0])(jnp.asarray(logps))
    np.testing.assert_array_equal(pulls[jnp.asarray(weights == 0)], 0.0)
    assert np.isfinite(pulls).all()
