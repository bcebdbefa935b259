"""Answer log-probabilities: chunked equals dense, nothing as wide as the vocabulary is kept, masks come from lengths."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.models.decoder import apply
from meetjax.objectives.logps import CHUNK, answer_logps, answer_mask, token_logps
from meetjax.types import Batch
from tests.conftest import QUICK, TINY, assert_close, assert_trees_close, random_bank, random_params

VOCAB, WIDTH = 97, 16


def dense_logps(params, hidden, targets):
    scores = jax.nn.log_softmax(hidden @ params["head"], axis=-1)
    return jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("positions", [1, 37, CHUNK, 2 * CHUNK + 5])
def test_token_logps_equals_dense_log_softmax(positions):
    """Value, and gradient in the hidden states and in the head, each position under its own weight."""
    draw = np.random.default_rng(positions)
    hidden = jnp.asarray(draw.normal(size=(positions, WIDTH)), jnp.float32)
    params = {"head": jnp.asarray(draw.normal(size=(WIDTH, VOCAB)), jnp.float32)}
    targets = jnp.asarray(draw.integers(0, VOCAB, positions), jnp.int32)
    weights = jnp.asarray(draw.normal(size=positions), jnp.float32)

    def run(logps):
        return jax.jit(jax.value_and_grad(lambda h, p: jnp.sum(logps(p, h, targets) * weights), (0, 1)), compiler_options=QUICK)(
            hidden, params
        )

    assert_close(token_logps(params, hidden, targets), dense_logps(params, hidden, targets))
    (value, grads), (expected, expected_grads) = run(token_logps), run(dense_logps)
    assert_close(value, expected, factor=positions)
    assert_trees_close(grads, expected_grads, factor=4)


def test_no_buffer_holds_all_logits():
    """The compiled gradient has a [CHUNK, V] buffer and none of [M, V], forward or backward."""
    positions, vocab = 4 * CHUNK, 1009
    shapes = (jax.ShapeDtypeStruct((positions, WIDTH), jnp.float32), jax.ShapeDtypeStruct((positions,), jnp.int32))
    head = {"head": jax.ShapeDtypeStruct((WIDTH, vocab), jnp.float32)}
    gradient = jax.jit(jax.grad(lambda p, h, t: jnp.sum(token_logps(p, h, t)), (0, 1)), compiler_options=QUICK)
    found = re.findall(r"f32\[([\d,]+)\]", gradient.lower(head, *shapes).compile().as_text())
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for shape in found if str(vocab) in shape.split(",")]
    assert CHUNK * vocab in sizes  # the search sees what it looks for
    assert max(sizes) < positions * vocab / 2


def test_answer_mask_is_from_lengths():
    """Position t predicts token t + 1: the first answer token up to EOS count, whatever the tokens are."""
    mask = answer_mask(jnp.array([[2, 1], [3, 4]]), jnp.array([[4, 6], [4, 6]]), 6)
    expected = [[[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]]
    np.testing.assert_array_equal(mask, expected)


def make_batch(width=11, filler=0):
    """Two prompts with two answers of unequal lengths; tokens behind the length are `filler`."""
    tokens = np.random.default_rng(5).integers(3, VOCAB, (2, 2, width)).astype(np.int32)
    lengths = np.array([[11, 7], [5, 9]], np.int32)
    tokens = np.where(np.arange(width) < lengths[..., None], tokens, filler)
    return Batch(tokens, np.array([[3, 3], [2, 2]], np.int32), lengths, np.ones(2, np.float32))


scores = jax.jit(answer_logps, static_argnums=0, compiler_options=QUICK)


def test_answer_logps_equals_a_loop():
    """Every answer token's own log-probability, one by one, under a bank with a gate a prompt."""
    params, bank, batch = random_params(TINY), random_bank(TINY, ("lora", "edit"), entries=(0,)), make_batch()
    gates = np.array([[0.5], [1.0]], np.float32)
    batch = Batch(batch.tokens, batch.starts, batch.lengths, batch.weights, gates)
    found = np.asarray(scores(TINY, params, bank, batch))
    logits = jax.jit(apply, static_argnums=0, compiler_options=QUICK)
    flat = logits(TINY, params, batch.tokens.reshape(4, -1), bank, np.repeat(gates, 2, axis=0))
    logps = np.asarray(jax.nn.log_softmax(flat, axis=-1)).reshape(2, 2, 11, VOCAB)
    for b in range(2):
        for c in range(2):
            places = range(batch.starts[b, c], batch.lengths[b, c])
            expected = sum(logps[b, c, t - 1, batch.tokens[b, c, t]] for t in places)
            assert_close(found[b, c], expected, factor=len(places))


@pytest.mark.parametrize("filler", [1, 2, 96])
def test_padding_values_never_matter(filler):
    """Not even when padding looks like BOS, EOS or text: masks are lengths, never values."""
    params = random_params(TINY)
    np.testing.assert_array_equal(scores(TINY, params, None, make_batch(filler=filler)), scores(TINY, params, None, make_batch()))
