"""SFT: the mean over all answer tokens of a batch, not the mean of the rows' means; conditional SFT: the same of each class."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.sft import ConditionalSft, Sft, sft_loss
from meetjax.train.step import make_gradient, partition
from meetjax.types import Batch
from tests.conftest import TINY, assert_trees_close, random_bank, random_params

LOGPS = np.array([[-6.0], [-1.0], [-30.0]], np.float32)
STARTS, LENGTHS = np.array([[2], [3], [1]], np.int32), np.array([[5], [4], [9]], np.int32)


def make_batch(weights):
    return Batch(np.ones((3, 1, 9), np.int32), STARTS, LENGTHS, np.asarray(weights, np.float32))


def test_mean_over_answer_tokens():
    """Answers of 3, 1 and 8 tokens: (6 + 1 + 30) / 12."""
    total, count, metrics = Sft()(jnp.asarray(LOGPS), make_batch([1, 1, 1]))
    assert (float(total), float(count)) == (37.0, 12.0)
    assert tuple(map(float, metrics["logps/chosen"])) == (-37.0, 3.0)


def test_filled_up_rows_do_not_count():
    total, count, metrics = Sft()(jnp.asarray(LOGPS), make_batch([1, 1, 0]))
    assert (float(total), float(count)) == (7.0, 4.0)
    assert tuple(map(float, metrics["logps/chosen"])) == (-7.0, 2.0)


def test_gradient_is_minus_the_weight():
    """Every answer token pulls alike, so d total / d s is -1 for real rows and 0 for filled-up ones."""
    tokens = jnp.asarray(LENGTHS - STARTS, jnp.float32)
    gradient = jax.grad(lambda s: sft_loss(s, tokens, jnp.array([1.0, 1.0, 0.0]))[0])(jnp.asarray(LOGPS))
    np.testing.assert_array_equal(gradient, [[-1.0], [-1.0], [0.0]])


CLASSES = np.array([1, 0, 1], np.int32)


def labelled(weights=(1, 1, 1), classes=CLASSES):
    return dataclasses.replace(make_batch(weights), classes=np.asarray(classes, np.int32))


def outcome(objective, batch, logps=LOGPS):
    """(loss, metrics as means) of a batch that is whole, as the training step has them."""
    total, weight = objective.pool(jnp.asarray(logps), batch)
    value, count, metrics = objective(jnp.asarray(logps), batch, total / jnp.maximum(weight, 1.0))
    return float(value / jnp.maximum(count, 1.0)), {name: float(part / jnp.maximum(whole, 1.0)) for name, (part, whole) in metrics.items()}


def test_conditional_sft_is_sft_and_logs_each_class():
    """(6 + 1 + 30) / 12 tokens; good: 36 / 11, bad: 1 / 1."""
    loss, metrics = outcome(ConditionalSft(), labelled())
    np.testing.assert_allclose(loss, 37 / 12, rtol=1e-6)
    assert metrics == {"nll/good": pytest.approx(36 / 11), "nll/bad": pytest.approx(1.0)}


def test_each_class_has_its_own_normaliser_when_asked():
    """The sum of 36 / 11 and 1 / 1, and the gradient -1 / n_k of every answer of class k, as if the class were alone."""
    objective, batch = ConditionalSft(per_class=True), labelled()
    loss, _ = outcome(objective, batch)
    np.testing.assert_allclose(loss, 36 / 11 + 1, rtol=1e-6)
    shares = jnp.array([1 / 12, 11 / 12])
    pulls = jax.grad(lambda s: objective(s, batch, shares)[0] / 12)(jnp.asarray(LOGPS))
    np.testing.assert_allclose(pulls, [[-1 / 11], [-1], [-1 / 11]], rtol=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("label", [0, 1])
def test_an_absent_class_gives_no_nan(per_class, label):
    """One class alone is plain SFT; the other logs 0."""
    loss, metrics = outcome(ConditionalSft(per_class), labelled(classes=[label] * 3))
    np.testing.assert_allclose(loss, 37 / 12, rtol=1e-6)
    assert sorted(metrics.values()) == [0.0, pytest.approx(37 / 12)]
    assert outcome(ConditionalSft(per_class), labelled((0, 0, 0)))[0] == 0.0  # nothing but filling


def test_filled_up_rows_are_of_no_class():
    """Without the row of 8 tokens: good 6 / 3, bad 1 / 1."""
    loss, metrics = outcome(ConditionalSft(per_class=True), labelled((1, 1, 0)))
    np.testing.assert_allclose(loss, 2 + 1, rtol=1e-6)
    assert metrics == {"nll/good": pytest.approx(2.0), "nll/bad": pytest.approx(1.0)}


def test_more_classes_than_two():
    """Scores in buckets: the sum over the two buckets that occur, of four; they are logged by number."""
    loss, metrics = outcome(ConditionalSft(per_class=True, classes=4), labelled(classes=[3, 0, 3]))
    np.testing.assert_allclose(loss, 36 / 11 + 1, rtol=1e-6)
    assert metrics == {"nll/0": pytest.approx(1.0), "nll/1": 0.0, "nll/2": 0.0, "nll/3": pytest.approx(36 / 11)}


@functools.cache
def gradient_of(microbatches):
    config = dataclasses.replace(TINY, layers=2, vocab=98)
    return config, jax.jit(make_gradient(config, ConditionalSft(per_class=True), microbatches))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatch_invariance(microbatches):
    """A class's normaliser is that of the whole batch: parts that hold one class, or filling alone, change nothing."""
    draw = np.random.default_rng(5)
    lengths, tokens = draw.integers(5, 11, (8, 1)).astype(np.int32), draw.integers(3, 97, (8, 1, 10)).astype(np.int32)
    weights, classes = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32), np.array([1, 1, 1, 0, 1, 1, 0, 0], np.int32)
    batch = Batch(tokens, np.full((8, 1), 3, np.int32), lengths, weights, classes=classes)
    config, whole_gradient = gradient_of(1)
    bank = random_bank(config, ("lora",), entries=(0,), linear=("q", "down"))
    parts = partition(random_params(config), bank, kinds=("lora",), base=False)
    whole, metrics = whole_gradient(*parts, batch)
    split, split_metrics = gradient_of(microbatches)[1](*parts, batch)
    assert_trees_close(split, whole)
    assert metrics.keys() == split_metrics.keys() == {"loss", "nll/good", "nll/bad"}
    np.testing.assert_allclose(metrics["loss"], metrics["nll/good"] + metrics["nll/bad"], rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-5, err_msg=name)
