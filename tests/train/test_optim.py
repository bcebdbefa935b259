"""The optimiser: its schedule, and a gradient norm for each gate column."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meetjax.adapters.edit import EditSpec, init_edit
from meetjax.adapters.tree import Bank
from meetjax.train.optim import clip_by_column_norm, make_optimizer
from meetjax.train.stage import Optim
from meetjax.train.step import Parts
from tests.conftest import TINY, assert_trees_close, random_bank


def clipped(parts, limit=0.5):
    return clip_by_column_norm(limit).update(parts, optax.EmptyState())[0]


def column(bank, at):
    """The adapters of one column as a bank of their own."""
    axes = {"prompt": 0, "lora": 1, "edit": 1}
    kept = {}
    for kind, axis in axes.items():
        tree = jax.tree.map(lambda leaf, axis=axis: jnp.take(leaf, jnp.array([at]), axis=axis), getattr(bank, kind))
        kept[kind] = dataclasses.replace(tree, entries=(0,))
    return Bank(**kept)


def test_columns_clip_as_if_they_were_alone():
    """A mixed run of two controls is two runs: neither column's norm depends on the other's."""
    bank = random_bank(TINY, ("prompt", "lora", "edit"), entries=(0, 1))
    small = {"prompt": (1,), "lora": (slice(None), 1), "edit": (slice(None), 1)}
    for kind, place in small.items():
        shrunk = jax.tree.map(lambda leaf, at=place: jnp.asarray(leaf).at[at].multiply(1e-4), getattr(bank, kind))
        bank = dataclasses.replace(bank, **{kind: shrunk})
    found = clipped(Parts(adapters=bank)).adapters
    for at in (0, 1):
        alone = column(bank, at)
        expected, _ = optax.clip_by_global_norm(0.5).update(alone, optax.EmptyState())
        assert_trees_close(column(found, at), expected)
        assert (float(optax.tree.norm(alone)) > 0.5) == (at == 0)
    jax.tree.map(np.testing.assert_array_equal, column(found, 1), column(bank, 1))


def test_the_base_clips_by_itself():
    base, bank = {"a": jnp.full(4, 3.0), "b": jnp.full((2, 2), 4.0)}, random_bank(TINY, ("edit",), entries=(0,))
    found = clipped(Parts(params=base, adapters=bank))
    np.testing.assert_allclose(optax.tree.norm(found.params), 0.5, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.norm(found.adapters), 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.params["b"] / found.params["a"][0], 4 / 3, rtol=1e-6)


def test_no_gradient_stays_no_gradient():
    bank = jax.tree.map(jnp.zeros_like, random_bank(TINY, ("lora", "prompt"), entries=(0, 1)))
    for leaf in jax.tree.leaves(clipped(Parts(adapters=bank))):
        assert not np.asarray(leaf).any()


def test_bfloat16_scales_would_stand_still():
    """RED's released run in small: at rate 1e-3 a scale stored in bfloat16 never leaves 1; ours, a float32 difference from 1, learns."""
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    targets = inputs * jnp.linspace(0.9, 1.1, 8)[None]
    tx = make_optimizer(Optim(learning_rate=1e-3, schedule="constant", warmup=0.0, clip=0.0), 40)

    def learn(start, scale_of):
        def loss(vector):
            return jnp.mean((inputs * scale_of(vector).astype(jnp.float32)[None] - targets) ** 2)

        vector, state = start, tx.init(start)
        for _ in range(40):
            updates, state = tx.update(jax.grad(loss)(vector), state, vector)
            with jax.numpy_dtype_promotion("standard"):
                vector = optax.apply_updates(vector, updates)
        return np.asarray(scale_of(vector), np.float32)

    np.testing.assert_array_equal(learn(jnp.ones(8, jnp.bfloat16), lambda scale: scale), np.ones(8))
    ours = learn(init_edit(TINY, EditSpec()).down.s[0, 0, :8], lambda s: 1 + s)
    assert (np.sign(ours - 1) == np.sign(np.linspace(-0.1, 0.1, 8))).all() and np.abs(ours - 1).min() > 0.01
