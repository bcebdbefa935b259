"""Answer log-probabilities: every answer token and no other, behind an own prompt or behind a shared one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from meetjax.models.decoder import apply, hidden_states
from meetjax.models.layers import logits
from meetjax.objectives.logps import answer_logps, answer_places
from meetjax.types import Batch
from tests.conftest import TINY, assert_close, random_bank, random_params

VOCAB = 97


def test_answer_places_come_from_lengths():
    """Token t is predicted at t - 1, whatever the tokens are; the second answer of a row begins at the end of the common part."""
    starts, ends = np.array([[2, 1], [3, 4]], np.int32), np.array([[4, 6], [4, 6]], np.int32)
    owner, source = answer_places(Batch(np.zeros((2, 2, 6), np.int32), starts, ends, np.ones(2, np.float32)))
    x = -1
    np.testing.assert_array_equal(owner, [[x, x, 0, 0, x, x], [x, 0, 0, 0, 0, 0], [x, x, x, 0, x, x], [x, x, x, x, 0, 0]])
    np.testing.assert_array_equal(source[:, 1:], [[0, 1, 2, 3, 4]] * 4)
    starts, ends, common = np.array([[2, 5], [3, 6]], np.int32), np.array([[4, 8], [6, 7]], np.int32), np.array([2, 3], np.int32)
    owner, source = answer_places(Batch(np.zeros((2, 1, 8), np.int32), starts, ends, np.ones(2, np.float32), common=common))
    np.testing.assert_array_equal(owner, [[x, x, 0, 0, x, 1, 1, 1], [x, x, x, 0, 0, 0, 1, x]])
    np.testing.assert_array_equal(source[:, 1:], [[0, 1, 2, 1, 4, 5, 6], [0, 1, 2, 3, 4, 2, 6]])


def make_batch(width=11, filler=0):
    """Two prompts with two answers of unequal lengths; tokens behind the length are `filler`."""
    tokens = np.random.default_rng(5).integers(3, VOCAB, (2, 2, width)).astype(np.int32)
    lengths = np.array([[11, 7], [5, 9]], np.int32)
    tokens = np.where(np.arange(width) < lengths[..., None], tokens, filler)
    return Batch(tokens, np.array([[3, 3], [2, 2]], np.int32), lengths, np.ones(2, np.float32))


scores = jax.jit(answer_logps, static_argnums=0)


def test_answer_logps_equals_a_loop():
    """Every answer token's own log-probability, one by one, under a bank with a gate a prompt."""
    params, bank, batch = random_params(TINY), random_bank(TINY, ("lora", "edit"), entries=(0,)), make_batch()
    gates = np.array([[0.5], [1.0]], np.float32)
    batch = Batch(batch.tokens, batch.starts, batch.ends, batch.weights, gates)
    found = np.asarray(scores(TINY, params, bank, batch))
    flat = jax.jit(apply, static_argnums=0)(TINY, params, batch.tokens.reshape(4, -1), bank, np.repeat(gates, 2, axis=0))
    logps = np.asarray(jax.nn.log_softmax(flat, axis=-1)).reshape(2, 2, 11, VOCAB)
    for b in range(2):
        for c in range(2):
            places = range(batch.starts[b, c], batch.ends[b, c])
            expected = sum(logps[b, c, t - 1, batch.tokens[b, c, t]] for t in places)
            assert_close(found[b, c], expected, factor=len(places))


def test_logps_are_float32_whatever_the_activations_are():
    """Not sums in bfloat16, which have 8 bits: those of the same states in float32, to the rounding of the states alone."""
    config, params, batch = dataclasses.replace(TINY, dtype="bfloat16"), random_params(TINY), make_batch()
    narrow = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    found = scores(config, narrow, None, batch)
    hidden = hidden_states(config, narrow, batch.tokens.reshape(4, -1)).astype("float32")
    logps = np.asarray(jax.nn.log_softmax(logits(jax.tree.map(lambda leaf: leaf.astype("float32"), narrow), hidden))).reshape(
        2, 2, 11, VOCAB
    )
    expected = [
        [sum(logps[b, c, t - 1, batch.tokens[b, c, t]] for t in range(batch.starts[b, c], batch.ends[b, c])) for c in range(2)]
        for b in range(2)
    ]
    assert found.dtype == np.float32
    assert_close(found, np.array(expected), factor=11)


@pytest.mark.parametrize("filler", [1, 2, 96])
def test_padding_values_never_matter(filler):
    """Not even when padding looks like BOS, EOS or text: masks are lengths, never values."""
    params = random_params(TINY)
    np.testing.assert_array_equal(scores(TINY, params, None, make_batch(filler=filler)), scores(TINY, params, None, make_batch()))
