"""Streams: which copies of a row run, how they are weighted, and that mixing hidden states is mixing logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from meetjax.models.layers import Gates
from meetjax.models.streams import Streams, block_gates, fan_out, kind_gates, make_streams, mix, repeat
from tests.conftest import BATCH, DIAL, TINY, TOKENS, apart, assert_close, assert_differs, quick_forward, random_bank, take

GATES = np.array([[1, 0], [0, 1], [0.6, 0.3], [1.4, -0.2]], np.float32)


def test_no_bank_is_one_stream_without_weights():
    streams = make_streams(None, None, None, BATCH)
    assert streams == Streams(None, None, (None,))
    h = jnp.ones((BATCH, 3, 2))
    assert repeat(h, streams) is h and mix(h, streams) is h and fan_out({None: h}, streams) is h


def test_one_ungated_identity_block_is_one_stream():
    bank = random_bank(TINY, ("identity",), entries=(0,))
    assert make_streams(bank, None, None, BATCH).blocks == (0,)


def test_identity_streams_and_weights():
    streams = make_streams(random_bank(TINY, ("identity", "edit")), jnp.asarray(GATES), None, BATCH)
    assert streams.blocks == (0, 1, None)
    np.testing.assert_allclose(streams.weights, np.stack([GATES[:, 0], GATES[:, 1], 1 - GATES.sum(1)], axis=1), atol=1e-6)
    np.testing.assert_array_equal(streams.gates, np.repeat(GATES, 3, axis=0))


def test_dial_adds_the_base_as_a_stream_with_every_gate_off():
    streams = make_streams(random_bank(TINY, ("lora",)), jnp.asarray(GATES), jnp.asarray(DIAL), BATCH)
    assert streams.blocks == (None, None)
    np.testing.assert_array_equal(streams.weights, np.stack([DIAL, 1 - DIAL], axis=1))
    np.testing.assert_array_equal(streams.gates.reshape(BATCH, 2, 2), np.stack([GATES, 0 * GATES], axis=1))


def test_dial_and_identity_weights_sum_to_one():
    streams = make_streams(random_bank(TINY, ("identity",)), jnp.asarray(GATES), jnp.asarray(DIAL), BATCH)
    assert streams.blocks == (0, 1, None, None)
    np.testing.assert_allclose(streams.weights.sum(1), np.ones(BATCH), atol=1e-6)


def test_a_stream_of_weight_zero_adds_exactly_nothing():
    streams = Streams(None, jnp.array([[0.0, 1.0]]), (0, None))
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    np.testing.assert_array_equal(mix(h, streams)[0], h[1])


def test_rows_of_a_stream_stay_beside_each_other():
    """[B, S] order, so that a batch split over devices needs no exchange."""
    streams = Streams(None, jnp.ones((2, 2)), (0, None))
    entered = {0: jnp.array([[10.0], [20.0]]), None: jnp.array([[1.0], [2.0]])}
    np.testing.assert_array_equal(fan_out(entered, streams)[:, 0], [10, 1, 20, 2])
    np.testing.assert_array_equal(repeat(entered[None], streams)[:, 0], [1, 1, 2, 2])


def test_kind_gates_read_their_columns_and_the_lora_scale():
    bank = apart(random_bank(TINY, ("lora", "edit")))
    gates = jnp.arange(8, dtype=jnp.float32).reshape(2, 4)
    np.testing.assert_array_equal(kind_gates(bank, "lora", gates), 1.5 * gates[:, :2])
    np.testing.assert_array_equal(kind_gates(bank, "edit", gates), gates[:, 2:])
    assert kind_gates(bank, "prompt", gates) is None
    ungated = block_gates(bank, None)
    assert isinstance(ungated, Gates) and ungated.lora.shape == (1, 2) and float(ungated.lora[0, 0]) == 1.5


def test_logit_dial_is_linear_in_logits(base):
    """z = d z_adapted + (1 - d) z_base, for a bank of every kind and dials beyond [0, 1]."""
    config, params, plain = base
    bank = apart(random_bank(config))
    gates = jnp.asarray(np.random.default_rng(3).uniform(0, 1, (BATCH, 8)), jnp.float32)
    adapted = np.asarray(quick_forward(config, params, TOKENS, bank, gates))
    dialled = quick_forward(config, params, TOKENS, bank, gates, dial=DIAL)
    d = DIAL[:, None, None]
    assert_close(dialled, d * adapted + (1 - d) * plain)
    assert_differs(adapted, plain)


def test_identity_gates_are_linear_in_logits(base):
    """z = sum_e g_e z_e + (1 - sum_e g_e) z_plain."""
    config, params, plain = base
    bank = random_bank(config, ("identity",))
    first, second = (np.asarray(quick_forward(config, params, TOKENS, take(bank, row))) for row in (0, 1))
    a, b = GATES[:, 0, None, None], GATES[:, 1, None, None]
    assert_close(quick_forward(config, params, TOKENS, bank, GATES), a * first + b * second + (1 - a - b) * plain)
    assert_differs(first, second)


def test_identity_block_with_content_is_a_deeper_base(variant):
    """A block in front of block 0, windowed as block 0 is, whatever the windows of the layers behind it."""
    config, params = variant
    bank = random_bank(config, ("identity",), entries=(0,))
    blocks = {name: jnp.concatenate([bank.identity.block[name][:, 0], leaf]) for name, leaf in params["blocks"].items()}
    windows = config.window_layers
    if windows is not None:
        windows = tuple(layer + 1 for layer in windows) + ((0,) if 0 in windows else ())
    deeper = dataclasses.replace(config, layers=config.layers + 1, window_layers=windows)
    expected = quick_forward(deeper, params | {"blocks": blocks}, TOKENS)
    assert_close(quick_forward(config, params, TOKENS, bank), expected)
    assert_differs(expected, quick_forward(config, params, TOKENS))


def test_streams_mix_in_float32(base):
    """Two bfloat16 hidden states meet in float32: a dial of 1 returns the adapted one exactly."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2 * BATCH, 3, 4)), jnp.bfloat16)
    streams = Streams(None, jnp.tile(jnp.array([[1.0, 0.0]]), (BATCH, 1)), (None, None))
    mixed = jax.jit(lambda x: mix(x, streams))(h)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(mixed), np.asarray(h[::2]))
