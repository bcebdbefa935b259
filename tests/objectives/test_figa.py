"""FIGA: by hand, its bound, and what its gate leaves out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meetjax.objectives.figa import Figa, figa_loss
from meetjax.types import Batch

SCORES = jnp.array([[-0.2, -2.0, -0.5, -3.0], [-0.1, -0.7, -0.6, -0.4]], jnp.float32)
WEIGHTS = jnp.array([[0.0, 1.0, 0.0, 1.0], [-1.0, -1.0, -1.0, 0.0]], jnp.float32)


def test_loss_by_hand():
    """New tokens at 2 and 3 nats; of the dropped ones those at 0.1 and 0.6 nats count, the one at 0.7 does not."""
    total, count, kept = figa_loss(SCORES, WEIGHTS, 0.5, 0.6)
    np.testing.assert_allclose(total, 2 + 3 - 0.5 * (0.1 + 0.6), rtol=1e-6)
    assert count == 4
    np.testing.assert_array_equal(kept, [[0, 1, 0, 1], [1, 0, 1, 0]])
    assert tuple(map(float, figa_loss(SCORES, WEIGHTS, 0.5, 0.0)[:2])) == (5.0, 2.0), "a threshold of 0 removes all dropped tokens"


def test_gradient_goes_through_the_losses_and_not_the_gate():
    gradient = jax.grad(lambda s: figa_loss(s, WEIGHTS, 0.5, 0.6)[0])(SCORES)
    np.testing.assert_array_equal(gradient, [[0, -1, 0, -1], [0.5, 0, 0.5, 0]])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-20, 0), st.sampled_from([-1.0, 0.0, 1.0])), min_size=1, max_size=12))
def test_loss_is_bounded_from_below(tokens):
    scores, weights = (jnp.array([values], jnp.float32) for values in zip(*tokens, strict=True))
    total, count, _ = figa_loss(scores, weights, 0.5, 0.6)
    assert float(total) >= -0.3 * float(count) - 1e-5


def test_filled_up_rows_do_not_count():
    batch = Batch(
        np.ones((2, 1, 4), np.int32), np.zeros((2, 2), np.int32), np.ones((2, 2), np.int32), np.array([1, 0], np.float32),
        token_weights=np.asarray(WEIGHTS)[:, None],
    )  # fmt: skip
    total, count, metrics = Figa()(SCORES, batch)
    assert (float(total), float(count)) == (5.0, 2.0)
    assert tuple(map(float, metrics["nll/new"])) == (5.0, 2.0) and tuple(map(float, metrics["kept/dropped"])) == (0.0, 0.0)
