"""SFT: the mean over all answer tokens of a batch, not the mean of the rows' means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from meetjax.objectives.sft import Sft, sft_loss
from meetjax.types import Batch

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
