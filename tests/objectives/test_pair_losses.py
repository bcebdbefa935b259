"""Laws of the losses that compare a pair with a reference: values and gradients known by hand, and what must change nothing."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.kto import ApoZeroUnpaired
from meetjax.objectives.preference import (
    ApoDown,
    ApoZero,
    Cdpo,
    Dpo,
    Hinge,
    Ipo,
    NormalizedDpo,
    RobustDpo,
    cdpo_loss,
    dpo_loss,
    robust_loss,
)
from meetjax.types import Batch

BETA, EPSILON, TAU = 0.3, 0.2, 0.05
FAMILY = {
    "dpo": Dpo(BETA),
    "cdpo": Cdpo(BETA, EPSILON),
    "robust": RobustDpo(BETA, EPSILON),
    "norm": NormalizedDpo(BETA),
    "ipo": Ipo(TAU),
    "ipo-sums": Ipo(TAU, length_normalize=False),
    "hinge": Hinge(BETA),
    "apo-zero": ApoZero(BETA),
    "apo-down": ApoDown(BETA),
}
EVERY = pytest.mark.parametrize("name", FAMILY)
DRAW = np.random.default_rng(1)
LOGPS, REFERENCE = (DRAW.normal(-40, 6, (8, 2)).astype(np.float32) for _ in range(2))
TOKENS = DRAW.integers(1, 30, (8, 2)).astype(np.int32)
SMALL = 1e-5
"""Float32 sums of terms up to 100 nats: relative to the larger of 1 and the value."""


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = {  # of the log-ratios (D_w, D_l) = (c, r) and lengths (m, n), in float64 and by other identities than the library's
    "dpo": lambda c, r, m, n: softplus(-BETA * (c - r)),
    "cdpo": lambda c, r, m, n: softplus(-BETA * (c - r)) + EPSILON * BETA * (c - r),
    "robust": lambda c, r, m, n: softplus(-BETA * (c - r)) - EPSILON * BETA * (c - r) / (1 - 2 * EPSILON),
    "norm": lambda c, r, m, n: softplus(-BETA * (c / m - r / n)),
    "ipo": lambda c, r, m, n: (c / m - r / n - 10) ** 2,
    "ipo-sums": lambda c, r, m, n: (c - r - 10) ** 2,
    "hinge": lambda c, r, m, n: np.maximum(0, 1 - BETA * (c - r)),
    "apo-zero": lambda c, r, m, n: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo-down": lambda c, r, m, n: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
}  # fmt: skip


def make_batch(ref_logps, tokens=TOKENS, weights=None):
    """Answers of the given lengths behind prompts of three tokens; the text is of no account to a loss."""
    count = len(ref_logps)
    weights = np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32)
    starts = np.full((count, 2), 3, np.int32)
    return Batch(np.ones((count, 2, 40), np.int32), starts, starts + tokens[:count], weights, ref_logps=jnp.asarray(ref_logps))


def losses(objective, logps, ref_logps, tokens=TOKENS):
    return np.asarray(objective.scores(jnp.asarray(logps), make_batch(ref_logps, tokens))[0])


def gradient(objective, logps, ref_logps, tokens=TOKENS):
    """Of the sum of the pairs' losses, in (s_w, s_l): [B, 2]."""
    batch = make_batch(ref_logps, tokens)
    return np.asarray(jax.grad(lambda s: objective(s, batch)[0])(jnp.asarray(logps)))


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=SMALL, atol=SMALL)


@EVERY
@pytest.mark.parametrize("swap", [False, True], ids=["straight", "swapped"])
def test_loss_equals_the_formula_in_float64(name, swap):
    """Swapped answers are the formula of swapped log-ratios, so z turns into -z."""
    order = [1, 0] if swap else [0, 1]
    ratios = (LOGPS.astype(np.float64) - REFERENCE)[:, order]
    tokens = TOKENS[:, order].astype(np.float64)
    expected = FORMULAS[name](*ratios.T, *tokens.T)
    assert_equal(losses(FAMILY[name], LOGPS[:, order], REFERENCE[:, order], TOKENS[:, order]), expected)


@EVERY
def test_rewards_are_scaled_log_ratios(name):
    objective = FAMILY[name]
    _, rewards = objective.scores(jnp.asarray(LOGPS), make_batch(REFERENCE))
    assert_equal(rewards, getattr(objective, "beta", TAU) * (LOGPS.astype(np.float64) - REFERENCE))


AT_REFERENCE = {
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "robust": math.log(2),
    "norm": math.log(2),
    "ipo": 100.0,  # 1 / (4 tau^2)
    "ipo-sums": 100.0,
    "hinge": 1.0,
    "apo-zero": 1.0,
    "apo-down": 1.0,
}


@EVERY
def test_value_at_the_reference(name):
    assert_equal(losses(FAMILY[name], LOGPS, LOGPS), AT_REFERENCE[name])
    _, _, metrics = FAMILY[name](jnp.asarray(LOGPS), make_batch(LOGPS))
    assert {float(metrics[f"rewards/{side}"][0]) for side in ("chosen", "rejected", "margins")} == {0.0}
    assert float(metrics["rewards/accuracies"][0]) == 4.0  # eight ties


PER_TOKEN = 1 / TOKENS
AT_REFERENCE_GRADIENT = {  # in (s_w, s_l)
    "dpo": [-BETA / 2, BETA / 2],
    "cdpo": [-BETA / 2 * (1 - 2 * EPSILON), BETA / 2 * (1 - 2 * EPSILON)],
    "robust": [-BETA / 2 / (1 - 2 * EPSILON), BETA / 2 / (1 - 2 * EPSILON)],
    "norm": [-BETA / 2, BETA / 2] * PER_TOKEN,
    "ipo": [-1 / TAU, 1 / TAU] * PER_TOKEN,
    "ipo-sums": [-1 / TAU, 1 / TAU],
    "hinge": [-BETA, BETA],
    "apo-zero": [-BETA / 4, BETA / 4],
    "apo-down": [0.0, BETA / 4],
}


@EVERY
def test_gradient_at_the_reference(name):
    found = gradient(FAMILY[name], LOGPS, LOGPS)
    assert_equal(found, np.broadcast_to(AT_REFERENCE_GRADIENT[name], (8, 2)))
    if name == "apo-down":
        np.testing.assert_array_equal(found[:, 0], 0.0)  # exactly: the chosen answer does not move at the start


@EVERY
def test_a_constant_in_both_models_changes_nothing(name):
    shift = np.random.default_rng(3).integers(-8, 9, (8, 2)).astype(np.float32)
    assert_equal(losses(FAMILY[name], LOGPS + shift, REFERENCE + shift), losses(FAMILY[name], LOGPS, REFERENCE))


def test_no_swaps_make_dpo():
    expected = losses(Dpo(BETA), LOGPS, REFERENCE)
    for objective in (Cdpo(BETA, 0.0), RobustDpo(BETA, 0.0)):
        np.testing.assert_array_equal(losses(objective, LOGPS, REFERENCE), expected)
        np.testing.assert_array_equal(gradient(objective, LOGPS, REFERENCE), gradient(Dpo(BETA), LOGPS, REFERENCE))


@pytest.mark.parametrize("epsilon", [0.1, 0.35])
def test_flip_symmetry_of_cdpo(epsilon):
    """cDPO(z, eps) = cDPO(-z, 1 - eps): swapping the answers is swapping who is right."""
    straight, _ = cdpo_loss(LOGPS, REFERENCE, BETA, epsilon)
    flipped, _ = cdpo_loss(LOGPS[:, ::-1], REFERENCE[:, ::-1], BETA, 1 - epsilon)
    assert_equal(flipped, straight)


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_robust_is_unbiased(epsilon):
    """(1 - eps) robust(z) + eps robust(-z) = DPO(z)."""
    straight, _ = robust_loss(LOGPS, REFERENCE, BETA, epsilon)
    flipped, _ = robust_loss(LOGPS[:, ::-1], REFERENCE[:, ::-1], BETA, epsilon)
    expected, _ = dpo_loss(LOGPS, REFERENCE, BETA)
    assert_equal((1 - epsilon) * straight + epsilon * flipped, expected)


def test_robust_is_unbounded_below():
    """Its slope in z tends to -eps / (1 - 2 eps) = -1/8, so it is -12.5 at z = 100."""
    logps, zeros = np.array([[1000.0, 0.0]], np.float32), np.zeros((1, 2), np.float32)
    objective = RobustDpo(beta=0.1, epsilon=0.1)
    assert_equal(losses(objective, logps, zeros), [-12.5])
    assert_equal(gradient(objective, logps, zeros), [[-0.0125, 0.0125]])


@pytest.mark.parametrize(("epsilon", "least"), [(0.1, 2.1972246), (0.2, 1.3862944)])
def test_cdpo_is_least_at_its_wanted_margin(epsilon, least):
    """z* = ln((1 - eps) / eps)."""
    logps, zeros = np.array([[least / BETA, 0.0]] * 3, np.float32), np.zeros((3, 2), np.float32)
    logps[:, 0] += [-1.0, 0.0, 1.0]
    found = gradient(Cdpo(BETA, epsilon), logps, zeros)
    assert_equal(found[1], [0.0, 0.0])
    assert found[0, 0] < -1e-3 < 1e-3 < found[2, 0]


@pytest.mark.parametrize("normalize", [True, False])
def test_ipo_is_least_at_its_wanted_gap(normalize):
    """Mean log-ratios (or sums) 1 / (2 tau) = 10 nats apart: no loss and no gradient."""
    tokens = np.array([[4, 8]], np.int32)
    logps = np.array([[24.0, -32.0]] if normalize else [[6.0, -4.0]], np.float32)  # 24 / 4 - -32 / 8 = 10
    objective = Ipo(TAU, length_normalize=normalize)
    np.testing.assert_allclose(losses(objective, logps, np.zeros((1, 2), np.float32), tokens), 0.0, atol=1e-9)
    np.testing.assert_allclose(gradient(objective, logps, np.zeros((1, 2), np.float32), tokens), 0.0, atol=1e-5)


def test_hinge_stops_at_its_wanted_gap():
    """d >= 1 / beta: exactly nothing."""
    logps = np.array([[2.0, 0.0], [5.0, 0.0], [1.9, 0.0]], np.float32)
    found = gradient(Hinge(0.5), logps, np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(found[:2], 0.0)
    np.testing.assert_array_equal(found[2], [-0.5, 0.5])
    np.testing.assert_allclose(losses(Hinge(0.5), logps, np.zeros((3, 2), np.float32)), [0.0, 0.0, 0.05], atol=1e-6)


def test_apo_zero_is_the_sum_of_its_unpaired_terms():
    """The chosen answers as good rows, the rejected ones as bad rows; values and gradients."""

    def unpaired(logps, side):
        own = slice(side, side + 1)
        batch = dataclasses.replace(make_batch(REFERENCE[:, own]), classes=np.full(8, 1 - side, np.int32))
        return ApoZeroUnpaired(BETA)(logps[:, own], batch)[0]

    total, pulls = jax.value_and_grad(lambda s: unpaired(s, 0) + unpaired(s, 1))(jnp.asarray(LOGPS))
    assert_equal(total, losses(ApoZero(BETA), LOGPS, REFERENCE).sum())
    assert_equal(pulls, gradient(ApoZero(BETA), LOGPS, REFERENCE))


@EVERY
def test_large_margins_stay_finite(name):
    logps, zeros = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32), np.zeros((2, 2), np.float32)
    assert np.isfinite(losses(FAMILY[name], logps, zeros)).all()
    assert np.isfinite(gradient(FAMILY[name], logps, zeros)).all()


@EVERY
def test_filled_up_rows_enter_nothing(name):
    """Rows of weight 0, empty answers among them: sums, normaliser, metrics and gradients are those of the real rows alone."""
    weights, real = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32), [0, 2, 3, 5, 6]
    tokens = np.where(weights[:, None] > 0, TOKENS, 0).astype(np.int32)
    outcome, expected = (
        FAMILY[name](jnp.asarray(LOGPS[rows]), make_batch(REFERENCE[rows], tokens[rows], weights[rows])) for rows in (range(8), real)
    )
    jax.tree.map(assert_equal, outcome, expected)
    assert outcome[1] == 5
    pulls = jax.grad(lambda s: FAMILY[name](s, make_batch(REFERENCE, tokens, weights))[0])(jnp.asarray(LOGPS))
    np.testing.assert_array_equal(pulls[jnp.asarray(weights == 0)], 0.0)
    assert np.isfinite(pulls).all()


@EVERY
def test_rewards_have_no_gradient(name):
    """What is logged does not train."""
    batch = make_batch(REFERENCE)
    pulls = jax.grad(lambda s: sum(value for value, _ in FAMILY[name](s, batch)[2].values()))(jnp.asarray(LOGPS))
    np.testing.assert_array_equal(pulls, 0.0)
