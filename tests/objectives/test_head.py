"""The fused head: equal to a dense log-softmax in value and gradient, and nothing as wide as the vocabulary is kept."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.head import CHUNK, token_logps
from meetjax.train.sharding import make_mesh
from tests.conftest import assert_close, assert_trees_close

VOCAB, WIDTH = 97, 16


def dense(params, hidden, source, targets, scored):
    states = jnp.take_along_axis(hidden, source[:, :, None], axis=1)
    scores = jax.nn.log_softmax(states @ (params["head"] if "head" in params else params["embed"].T), axis=-1)
    return jnp.where(scored, jnp.take_along_axis(scores, targets[:, :, None], axis=2)[:, :, 0], 0.0)


def drawn(rows, length, tied=False, seed=0):
    """Several targets a source, so that their gradients meet."""
    draw = np.random.default_rng(seed)
    hidden = jnp.asarray(draw.normal(size=(rows, length, WIDTH)), jnp.float32)
    name, shape = ("embed", (VOCAB, WIDTH)) if tied else ("head", (WIDTH, VOCAB))
    params = {name: jnp.asarray(draw.normal(size=shape), jnp.float32)}
    source, targets = (jnp.asarray(draw.integers(0, high, (rows, length)), jnp.int32) for high in (length, VOCAB))
    return (
        params,
        hidden,
        source,
        targets,
        jnp.asarray(draw.random((rows, length)) < 0.6),
        jnp.asarray(draw.normal(size=(rows, length)), jnp.float32),
    )


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 37), (1, CHUNK), (4, CHUNK // 2 + 5)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
def test_token_logps_equals_dense_log_softmax(rows, length, tied, head_trains):
    params, hidden, source, targets, scored, weights = drawn(rows, length, tied)

    def run(logps):
        def loss(h, p):
            return jnp.sum(logps(p, h, source, targets, scored) * weights)

        return jax.jit(jax.value_and_grad(loss, (0, 1) if head_trains else 0))(hidden, params)

    assert_close(token_logps(params, hidden, source, targets, scored), dense(params, hidden, source, targets, scored))
    (value, grads), (expected, expected_grads) = run(token_logps), run(dense)
    assert_close(value, expected, factor=rows * length)
    assert_trees_close(grads, expected_grads, factor=4)


def test_nothing_scored_is_zero():
    params, hidden, source, targets, _, _ = drawn(2, 9)
    none = jnp.zeros((2, 9), bool)
    value, gradient = jax.value_and_grad(lambda h: jnp.sum(token_logps(params, h, source, targets, none)))(hidden)
    assert value == 0 and not np.asarray(gradient).any()


def test_sharded_equals_single_device():
    """Rows over two mesh axes: each device gathers from its own rows, one of which scores nothing."""
    params, hidden, source, targets, scored, _ = drawn(8, 21)
    scored = scored.at[2].set(False)

    def loss(h, p):
        return jnp.sum(token_logps(p, h, source, targets, scored) ** 2)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, params)
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(jax.device_put(hidden, place), params)
    assert_trees_close(found, expected, factor=4)


@pytest.mark.parametrize("wrt", [0, (0, 1)], ids=["frozen", "trained"])
def test_no_buffer_holds_all_logits(wrt):
    """The compiled gradient has [CHUNK, V] buffers and none of [T, V], forward or backward."""
    rows, length, vocab = 4, CHUNK, 1009
    hidden, places = jax.ShapeDtypeStruct((rows, length, WIDTH), jnp.float32), jax.ShapeDtypeStruct((rows, length), jnp.int32)
    head, scored = {"head": jax.ShapeDtypeStruct((WIDTH, vocab), jnp.float32)}, jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    gradient = jax.jit(jax.grad(lambda h, p, s, t, m: jnp.sum(token_logps(p, h, s, t, m)), wrt))
    found = re.findall(r"f32\[([\d,]+)\]", gradient.lower(hidden, head, places, places, scored).compile().as_text())
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for shape in found if str(vocab) in shape.split(",")]
    assert CHUNK * vocab in sizes  # the search sees what it looks for
    assert max(sizes) < rows * length * vocab / 2


def test_a_frozen_head_costs_two_products():
    """Forward and gradient in the hidden states: 2 products of a chunk; a head that trains adds the logits again and its own."""
    rows, length, vocab = 1, CHUNK, 4099
    hidden, places = jnp.ones((rows, length, WIDTH)), jnp.ones((rows, length), jnp.int32)
    scored, head = jnp.ones((rows, length), bool), {"head": jnp.ones((WIDTH, vocab))}
    counts = {}
    for name, wrt in (("frozen", 0), ("trained", (0, 1))):
        gradient = jax.jit(jax.grad(lambda h, p: jnp.sum(token_logps(p, h, places, places, scored)), wrt))
        text = gradient.lower(hidden, head).as_text()
        counts[name] = text.count("dot_general")
    assert counts == {"frozen": 2, "trained": 4}
