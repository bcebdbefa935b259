"""KTO and unpaired APO-zero: values and gradients by hand, what z0 may and may not do, and one z0 for every split of a batch."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.kto import ApoZeroUnpaired, Kto
from meetjax.train.step import make_gradient, partition
from meetjax.types import Batch
from tests.conftest import TINY, assert_trees_close, random_bank, random_params

BETA = 0.3
KTO = Kto(BETA, good_weight=1.0, bad_weight=1.5)
CLASSES = np.array([1, 0, 0, 1, 1, 0], np.int32)
DRAW = np.random.default_rng(1)
LOGPS, REFERENCE = (DRAW.normal(-40, 6, (6, 2)).astype(np.float32) for _ in range(2))
REFERENCE[:, 1] -= 4  # partners gain on average, so that z0 > 0
SMALL = 1e-5
"""Float32: relative to the larger of 1 and the value."""


def make_batch(ref_logps=REFERENCE, classes=CLASSES, weights=None):
    count, answers = ref_logps.shape
    weights = np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32)
    starts = np.full((count, answers), 3, np.int32)
    tokens = np.ones((count, answers, 9), np.int32)
    return Batch(tokens, starts, starts + 4, weights, ref_logps=jnp.asarray(ref_logps), classes=classes)


def outcome(logps, batch, objective=KTO):
    """(sum, count, metrics) of a batch that is whole, as the training step calls it."""
    total, weight = objective.pool(logps, batch)
    return objective(logps, batch, total / jnp.maximum(weight, 1.0))


def gradient(logps, batch, objective=KTO):
    return np.asarray(jax.grad(lambda s: outcome(s, batch, objective)[0])(jnp.asarray(logps)))


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=SMALL, atol=SMALL)


def test_loss_and_metrics_equal_the_formula_in_float64():
    ratios = LOGPS.astype(np.float64) - REFERENCE
    z0 = ratios[:, 1].mean()
    assert z0 > 1
    good, own = CLASSES == 1, ratios[:, 0]
    losses = np.where(good, 1 - 1 / (1 + np.exp(-BETA * (own - z0))), 1.5 * (1 - 1 / (1 + np.exp(-BETA * (z0 - own)))))
    total, count, metrics = outcome(jnp.asarray(LOGPS), make_batch())
    assert_equal(total, losses.sum())
    assert count == 6
    expected = {
        "rewards/good": (BETA * own[good].sum(), 3),
        "rewards/bad": (BETA * own[~good].sum(), 3),
        "logps/good": (LOGPS[good, 0].sum(), 3),
        "logps/bad": (LOGPS[~good, 0].sum(), 3),
        "kl": (6 * z0, 6),
    }
    assert metrics.keys() == expected.keys()
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=SMALL, err_msg=name)


@pytest.mark.parametrize("objective", [KTO, ApoZeroUnpaired(BETA, 1.0, 1.5)], ids=["kto", "apo-zero"])
def test_value_and_gradient_at_the_reference(objective):
    """Half of a row's weight; -beta / 4 on a good row's own answer, +beta / 4 on a bad one's, each times its weight."""
    answers = 2 if objective.partners else 1
    logps, batch = jnp.asarray(LOGPS[:, :answers]), make_batch(LOGPS[:, :answers])

    def total(s):
        return (outcome(s, batch) if objective.partners else objective(s, batch))[0]

    value, pulls = jax.value_and_grad(total)(logps)
    assert_equal(value, 3 * 0.5 + 3 * 0.75)
    assert_equal(pulls[:, 0], np.where(CLASSES == 1, -BETA / 4, 1.5 * BETA / 4))
    if objective.partners:
        np.testing.assert_array_equal(pulls[:, 1], 0.0)


def test_only_kto_pools_and_asks_for_partners():
    """The training step asks by `hasattr`, the data side by `partners`."""
    assert (Kto.partners, ApoZeroUnpaired.partners) == (True, False)
    assert hasattr(Kto(), "pool")
    assert not hasattr(ApoZeroUnpaired(), "pool")


def test_without_its_kl_term_kto_is_unpaired_apo_zero():
    """Partners that did not gain: z0 = 0, and the second answer might as well not be there."""
    total, count, metrics = outcome(jnp.asarray(LOGPS), make_batch(np.stack([REFERENCE[:, 0], LOGPS[:, 1]], axis=1)))
    expected, other, others = ApoZeroUnpaired(BETA, 1.0, 1.5)(jnp.asarray(LOGPS[:, :1]), make_batch(REFERENCE[:, :1]))
    np.testing.assert_array_equal(total, expected)
    assert count == other
    assert metrics.pop("kl") == (0.0, 6.0)
    assert metrics == others


@pytest.mark.parametrize(("gain", "z0"), [(-7.0, 0.0), (0.0, 0.0), (2.5, 2.5)])
def test_z0_is_never_negative(gain, z0):
    batch = make_batch(np.stack([REFERENCE[:, 0], LOGPS[:, 1] - np.float32(gain)], axis=1))
    assert_equal(outcome(jnp.asarray(LOGPS), batch)[2]["kl"][0] / 6, z0)


def test_no_gradient_through_z0():
    """z0 > 0 moves the loss, and still nothing pulls on a partner, in the loss or in what is logged."""
    batch = make_batch()
    assert float(outcome(jnp.asarray(LOGPS), batch)[2]["kl"][0]) > 6
    pulls = gradient(LOGPS, batch)
    np.testing.assert_array_equal(pulls[:, 1], 0.0)
    assert (np.abs(pulls[:, 0]) > 0).all()
    logged = jax.grad(lambda s: sum(value for value, _ in outcome(s, batch)[2].values()))(jnp.asarray(LOGPS))
    np.testing.assert_array_equal(logged, 0.0)
    straight = jax.grad(lambda z: KTO(jnp.asarray(LOGPS), batch, z)[0])(jnp.float32(2.0))
    assert straight == 0.0


def test_row_order_does_not_matter_when_partners_move_along():
    order = np.array([4, 2, 0, 5, 1, 3])
    total, count, metrics = outcome(jnp.asarray(LOGPS), make_batch())
    again = outcome(jnp.asarray(LOGPS[order]), make_batch(REFERENCE[order], CLASSES[order]))
    jax.tree.map(assert_equal, again, (total, count, metrics))
    assert_equal(gradient(LOGPS[order], make_batch(REFERENCE[order], CLASSES[order])), gradient(LOGPS, make_batch())[order])


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_finite(label):
    """The absent class has no rows and logs 0 / 0 as a sum and a weight of 0; nothing is NaN."""
    batch = make_batch(classes=np.full(6, label, np.int32))
    total, count, metrics = outcome(jnp.asarray(LOGPS), batch)
    assert np.isfinite(jax.tree.leaves((total, count, metrics))).all()
    absent = ("bad", "good")[1 - label]
    assert metrics[f"rewards/{absent}"] == metrics[f"logps/{absent}"] == (0.0, 0.0)
    assert np.isfinite(gradient(LOGPS, batch)).all()


def test_extremes_are_finite():
    logps = np.array([[1e4, 0.0], [1e4, 0.0], [-1e4, 0.0], [-1e4, 0.0]], np.float32)
    batch = make_batch(np.zeros((4, 2), np.float32), np.array([1, 0, 1, 0], np.int32))
    assert_equal(outcome(jnp.asarray(logps), batch)[0], 0.0 + 1.5 + 1.0 + 0.0)
    assert np.isfinite(gradient(logps, batch)).all()


def test_whole_numbers_are_weights_too():
    """A recipe may say 1 for 1.0, under strict promotion as well."""
    total, _, _ = outcome(jnp.asarray(LOGPS), make_batch(), Kto(1, 2, 1))
    assert_equal(total, outcome(jnp.asarray(LOGPS), make_batch(), Kto(1.0, 2.0, 1.0))[0])


@pytest.mark.parametrize("partners", [True, False], ids=["kto", "apo-zero"])
def test_filled_up_rows_enter_nothing(partners):
    """Neither the loss nor z0 nor any metric; their answers have no gradient."""
    weights, real, answers = np.array([1, 0, 1, 1, 0, 1], np.float32), [0, 2, 3, 5], 2 if partners else 1
    call = outcome if partners else ApoZeroUnpaired(BETA)
    logps, ref_logps = LOGPS[:, :answers], np.where(weights[:, None] > 0, REFERENCE, 1e3).astype(np.float32)[:, :answers]
    batch = make_batch(ref_logps, weights=weights)
    found = call(jnp.asarray(logps), batch)
    jax.tree.map(assert_equal, found, call(jnp.asarray(logps[real]), make_batch(ref_logps[real], CLASSES[real])))
    assert found[1] == 4
    pulls = jax.grad(lambda s: call(s, batch)[0])(jnp.asarray(logps))
    np.testing.assert_array_equal(pulls[jnp.array([1, 4])], 0.0)


SMALL_MODEL = dataclasses.replace(TINY, layers=2, vocab=98)


@functools.cache
def gradient_of(microbatches):
    return jax.jit(make_gradient(SMALL_MODEL, KTO, microbatches))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatch_invariance(microbatches):
    """One z0 for the whole batch, though the parts have z0 of their own, classes are uneven and one part is all filling."""
    draw = np.random.default_rng(5)
    lengths, tokens = draw.integers(5, 11, (8, 2)).astype(np.int32), draw.integers(3, 97, (8, 2, 10)).astype(np.int32)
    starts = np.full((8, 2), 3, np.int32)
    weights = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    classes = np.array([1, 1, 1, 0, 0, 1, 0, 0], np.int32)
    ref_logps = (-5.5 * (lengths - starts) + draw.normal(0, 2, (8, 2))).astype(np.float32)
    batch = Batch(tokens, starts, lengths, weights, ref_logps=ref_logps, classes=classes)
    bank = random_bank(SMALL_MODEL, ("lora",), entries=(0,), linear=("q", "down"))
    parts = partition(random_params(SMALL_MODEL), bank, kinds=("lora",), base=False)
    whole, metrics = gradient_of(1)(*parts, batch)
    split, split_metrics = gradient_of(microbatches)(*parts, batch)
    assert math.isfinite(float(metrics["loss"]))
    assert float(metrics["kl"]) > 0.5, "a z0 that is at work"
    assert_trees_close(split, whole)
    assert metrics.keys() == split_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=SMALL, err_msg=name)
