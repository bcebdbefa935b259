"""DPO: its value and gradient where they are known by hand, its symmetries, and its start."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.logps import answer_logps
from meetjax.objectives.preference import Dpo, dpo_loss, preferred
from meetjax.types import Batch
from tests.conftest import TINY, assert_close, random_params

BETA = 0.3
LOGPS = np.random.default_rng(1).normal(-40, 10, (6, 2)).astype(np.float32)
REFERENCE = np.random.default_rng(2).normal(-40, 10, (6, 2)).astype(np.float32)


def make_batch(ref_logps, weights=None):
    count = len(ref_logps)
    weights = np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32)
    ones = np.ones((count, 2), np.int32)
    return Batch(np.ones((count, 2, 4), np.int32), ones, 3 * ones, weights, ref_logps=ref_logps)


def test_loss_and_gradient_at_the_reference():
    """At policy = reference: ln 2, and -beta / 2 on the chosen, +beta / 2 on the rejected log-probability."""
    loss, gradient = jax.value_and_grad(lambda s: jnp.sum(dpo_loss(s, jnp.asarray(LOGPS), BETA)[0]))(jnp.asarray(LOGPS))
    assert_close(loss, 6 * math.log(2))
    np.testing.assert_allclose(gradient, np.tile([-BETA / 2, BETA / 2], (6, 1)), rtol=1e-6)


def test_loss_equals_the_formula_in_float64():
    loss, rewards = dpo_loss(LOGPS, REFERENCE, BETA)
    expected = BETA * (LOGPS.astype(np.float64) - REFERENCE)
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-(expected[:, 0] - expected[:, 1]))), rtol=1e-5, atol=1e-5)


def test_swapping_the_answers_negates_the_margin():
    """L(w, l) - L(l, w) = -(r_w - r_l), and the metrics change sides."""
    (loss, rewards), (swapped, swapped_rewards) = (
        dpo_loss(s, r, BETA) for s, r in ((LOGPS, REFERENCE), (LOGPS[:, ::-1], REFERENCE[:, ::-1]))
    )
    np.testing.assert_array_equal(swapped_rewards, np.asarray(rewards)[:, ::-1])
    np.testing.assert_allclose(loss - swapped, -(rewards[:, 0] - rewards[:, 1]), rtol=0, atol=1e-5)


def test_a_constant_in_both_models_changes_nothing():
    """What a prompt's normalisation adds to s and s_ref alike, per answer or per pair, cancels."""
    shift = np.random.default_rng(3).integers(-8, 9, (6, 2)).astype(np.float32)
    (loss, rewards), (moved, moved_rewards) = dpo_loss(LOGPS, REFERENCE, BETA), dpo_loss(LOGPS + shift, REFERENCE + shift, BETA)
    np.testing.assert_allclose(moved_rewards, rewards, rtol=0, atol=1e-5)
    np.testing.assert_allclose(moved, loss, rtol=0, atol=1e-5)


def test_large_margins_stay_finite():
    logps = jnp.array([[1e4, -1e4], [-1e4, 1e4]], jnp.float32)
    loss, gradient = jax.value_and_grad(lambda s: jnp.sum(dpo_loss(s, jnp.zeros_like(s), 1.0)[0]))(logps)
    np.testing.assert_allclose(loss, 2e4)
    np.testing.assert_allclose(gradient, [[0, 0], [-1, 1]], atol=1e-6)


def test_metrics_are_sums_over_real_pairs():
    """A filled-up row (weight 0) enters neither the loss nor any metric nor the normaliser."""
    weights = [1, 1, 0, 1, 0, 1]
    real = np.flatnonzero(weights)
    total, count, metrics = Dpo(BETA)(jnp.asarray(LOGPS), make_batch(REFERENCE, weights))
    loss, rewards = dpo_loss(LOGPS[real], REFERENCE[real], BETA)
    margins = np.asarray(rewards[:, 0] - rewards[:, 1])
    assert count == 4
    np.testing.assert_allclose(total, np.sum(loss), rtol=1e-6)
    expected = {
        "rewards/chosen": np.asarray(rewards[:, 0]),
        "rewards/rejected": np.asarray(rewards[:, 1]),
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "logps/chosen": LOGPS[real, 0],
        "logps/rejected": LOGPS[real, 1],
    }
    assert metrics.keys() == expected.keys()
    for name, (value, weight) in metrics.items():
        assert weight == 4
        np.testing.assert_allclose(value, expected[name].sum(), rtol=1e-5, err_msg=name)


def test_ties_count_half():
    np.testing.assert_array_equal(preferred(jnp.array([1.0, 0.0, -2.0])), [1.0, 0.5, 0.0])


@pytest.mark.parametrize("spec", [LoraSpec(rank=2), EditSpec(), IdentitySpec()], ids=["lora", "edit", "identity"])
def test_step0_preference_loss_is_ln2(spec):
    """A fresh adapter is the reference, so every reward is 0, up to the rounding of another program."""
    draw = np.random.default_rng(4)
    params, bank = random_params(TINY), init_bank(TINY, random_params(TINY), (spec,), None, jax.random.key(0))
    tokens = draw.integers(3, 97, (3, 2, 9)).astype(np.int32)
    starts = np.full((3, 2), 4, np.int32)
    batch = Batch(tokens, starts, draw.integers(6, 10, (3, 2)).astype(np.int32), np.ones(3, np.float32))
    scores = jax.jit(answer_logps, static_argnums=0)
    logps = scores(TINY, params, bank, batch)
    total, count, metrics = Dpo()(
        logps, Batch(tokens, starts, batch.ends, batch.weights, None, np.asarray(scores(TINY, params, None, batch)))
    )
    assert float(jnp.abs(logps).min()) > 1  # nats: there is something to compare
    assert_close(total / count, math.log(2))
    assert abs(float(metrics["rewards/margins"][0])) <= 1e-4
    assert abs(float(metrics["rewards/chosen"][0])) <= 1e-4
