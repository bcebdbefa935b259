"""RAHF: the contrast between instructions, and hidden states that are moved along it."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.bank import init_bank
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.tree import Bank
from meetjax.models.decoder import block_states
from meetjax.objectives.representation import Rahf, Scit, contrastive_instruction_loss, length, representation_loss
from meetjax.train.optim import make_optimizer
from meetjax.train.stage import Optim, Stage
from meetjax.train.step import init_state, make_gradient, make_step, partition
from meetjax.types import Batch
from tests.conftest import TINY, assert_close, assert_trees_close, random_bank, random_params

TAPS = (1, 2)
OWN, OTHER = np.array([-6.0, -9.0, -4.0], np.float32), np.array([-8.0, -9.0, -1.0], np.float32)
TOKENS = np.array([4.0, 3.0, 8.0], np.float32)


def test_contrast_by_hand():
    """a = b and e = 0: ln 2 beside the likelihood; exchanging the instructions exchanges a and b; with e the best share is 1 - e."""
    loss = contrastive_instruction_loss(OWN, OTHER, TOKENS, 0.0)
    assert_close(loss[1], 3.0 + math.log(2))
    a, b = np.exp(OWN.astype(np.float64) / TOKENS), np.exp(OTHER.astype(np.float64) / TOKENS)
    expected = -OWN / TOKENS - 0.8 * np.log(a / (a + b)) - 0.2 * np.log(b / (a + b))
    np.testing.assert_allclose(contrastive_instruction_loss(OWN, OTHER, TOKENS, 0.2), expected, rtol=1e-5)
    swapped = contrastive_instruction_loss(OTHER, OWN, TOKENS, 0.2) + OTHER / TOKENS
    np.testing.assert_allclose(swapped, contrastive_instruction_loss(OWN, OTHER, TOKENS, 0.8) + OWN / TOKENS, rtol=1e-5)
    gap = math.log(0.8 / 0.2)
    slope = jax.grad(lambda x: jnp.sum(contrastive_instruction_loss(jnp.zeros(1), x, jnp.ones(1), 0.2)))(jnp.array([-gap]))
    assert abs(float(slope[0])) < 1e-6
    summed = contrastive_instruction_loss(OWN, OTHER, TOKENS, 0.0, mean=False) + OWN / TOKENS
    np.testing.assert_allclose(summed, np.log1p(np.exp(OTHER - OWN)), rtol=1e-5)


def test_scit_counts_real_rows():
    batch = Batch(
        np.ones((3, 2, 9), np.int32),
        np.zeros((3, 2), np.int32),
        TOKENS[:, None].repeat(2, 1).astype(np.int32),
        np.array([1, 1, 0], np.float32),
    )
    logps = jnp.stack([OWN, OTHER], axis=1)
    total, count, metrics = Scit(epsilon=0.1)(logps, batch)
    np.testing.assert_allclose(total, np.sum(contrastive_instruction_loss(OWN, OTHER, TOKENS, 0.1)[:2]), rtol=1e-6)
    assert count == 2 and float(metrics["instruction/accuracies"][0]) == 1.5


def test_length_of_zero_has_no_gradient():
    vectors = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(length(x)))(vectors)
    assert value == 5.0
    np.testing.assert_allclose(gradient, [[0, 0], [0.6, 0.8]], rtol=1e-6)


def test_representation_loss_by_hand():
    found, target = np.zeros((2, 1, 3, 2), np.float32), np.zeros((2, 1, 3, 2), np.float32)
    found[0, 0, 0], found[1, 0, 1], found[:, 0, 2] = [3, 4], [6, 8], 99
    mask = np.array([[1.0, 1.0, 0.0]], np.float32)
    assert tuple(map(float, representation_loss(found, target, mask, "l2norm"))) == ((5 + 10) / 2, 2.0)
    assert tuple(map(float, representation_loss(found, target, mask, "mse"))) == ((25 + 100) / 2, 2.0)


def make_batch(width=12, same=False):
    """One answer of 3 or 4 tokens behind prompts of 2, 4 and 5 tokens; `same`: the good and the bad prompt are one."""
    draw = np.random.default_rng(4)
    starts, lengths = np.array([[2, 4, 5]] * 3, np.int32), np.array([[4], [3], [4]], np.int32)
    tokens = np.zeros((3, 3, width), np.int32)
    for b in range(3):
        answer, prompts = draw.integers(3, 97, lengths[b, 0]), [draw.integers(3, 97, n) for n in starts[b]]
        if same:
            prompts[2], starts[b, 2] = prompts[1], starts[b, 1]
        for k in range(3):
            row = np.concatenate([prompts[k], answer])
            tokens[b, k] = [*row, *[7] * (width - len(row))]
    return Batch(tokens, starts, starts + lengths, np.array([1, 1, 0], np.float32))


def fresh_lora():
    return init_bank(TINY, random_params(TINY), (LoraSpec(rank=2, sites=("q", "v")),), None, jax.random.key(0))


@functools.cache
def gradient_of(objective):
    return jax.jit(make_gradient(TINY, objective))


def run(objective, bank, batch, teacher=None):
    trainable, frozen = partition(random_params(TINY), bank, kinds=("lora",), base=False)
    return gradient_of(objective)(trainable, dataclasses.replace(frozen, teacher=teacher), batch)


def test_step_0_loss_is_alpha_times_the_direction():
    """B = 0: the student is the teacher, so the distance is alpha ||v||, averaged over the answer tokens of real rows."""
    gradient, metrics = run(Rahf(TAPS, 3.0), fresh_lora(), make_batch())
    assert float(metrics["loss"]) == pytest.approx(3 * float(metrics["direction"]), rel=1e-5) and metrics["loss"] > 0.01
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    by_hand, count, batch = 0.0, 0, make_batch()
    for b in range(2):
        n = batch.ends[b, 0] - batch.starts[b, 0]
        good, bad = (block_states(TINY, random_params(TINY), batch.tokens[b : b + 1, k], TAPS) for k in (1, 2))
        for g, w in zip(good, bad, strict=True):
            v = g[0, batch.starts[b, 1] :][:n] - w[0, batch.starts[b, 2] :][:n]
            by_hand += float(np.linalg.norm(v, axis=-1).sum()) / len(TAPS)
        count += n
    assert float(metrics["direction"]) == pytest.approx(by_hand / count, rel=1e-4)


def test_alpha_0_is_exactly_still():
    """Loss 0 and gradient exactly 0, not NaN; the same when good and bad are asked alike."""
    for objective, batch in ((Rahf(TAPS, 0.0), make_batch()), (Rahf(TAPS, 3.0), make_batch(same=True))):
        gradient, metrics = run(objective, fresh_lora(), batch)
        assert float(metrics["loss"]) == 0.0
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_pad_invariance():
    bank = random_bank(TINY, ("lora",), entries=(0,))
    (narrow, metrics), (wide, again) = (run(Rahf(TAPS, 3.0), bank, make_batch(width)) for width in (12, 17))
    assert_trees_close(wide, narrow, factor=4)
    assert_close(again["loss"], metrics["loss"], factor=4)


def test_dual_asks_two_models_alike():
    """Base and good are the frozen model, bad is another bank of its own: the direction is the difference of the two models."""
    objective = Rahf(TAPS, 2.0, asks=("plain",), looks=((0, ()), (0, ()), (0, (-1.0, 1.0))))
    other, batch = random_bank(TINY, ("lora",), entries=(0, 1)), make_batch()
    batch = dataclasses.replace(batch, tokens=batch.tokens[:, :1], starts=batch.starts[:, :1], ends=batch.ends[:, :1])
    _, metrics = run(objective, fresh_lora(), batch, other)
    assert float(metrics["loss"]) == pytest.approx(2 * float(metrics["direction"]), rel=1e-5)
    bad = block_states(TINY, random_params(TINY), batch.tokens[:, 0], TAPS, other, np.tile(np.float32([-1, 1]), (3, 1)))
    good = block_states(TINY, random_params(TINY), batch.tokens[:, 0], TAPS)
    differences = [np.asarray(g - w) for g, w in zip(good, bad, strict=True)]
    norms = [np.linalg.norm(v[b, 2 : batch.ends[b, 0]], axis=-1).sum() for v in differences for b in range(2)]
    assert float(metrics["direction"]) == pytest.approx(sum(norms) / len(TAPS) / 7, rel=1e-4)


def test_a_reachable_target_is_reached():
    """The student learns to be the teacher's other model when alpha is 1 and base + (good - bad) is a LoRA away."""
    objective = Rahf((1,), 1.0, asks=("plain",), looks=((0, ()), (0, (1.0,)), (0, ())))
    batch = make_batch()
    batch = dataclasses.replace(batch, tokens=batch.tokens[:, :1], starts=batch.starts[:, :1], ends=batch.ends[:, :1])
    wide = init_bank(TINY, random_params(TINY), (LoraSpec(rank=8, alpha=16.0, sites=("q", "v", "o", "down")),), None, jax.random.key(0))
    trainable, frozen = partition(random_params(TINY), wide, kinds=("lora",), base=False)
    frozen = dataclasses.replace(frozen, teacher=Bank(lora=random_bank(TINY, ("lora",), entries=(0,)).lora))
    stage = Stage(objective=objective, optim=Optim(learning_rate=2e-2, schedule="cosine", clip=0.0))
    tx = make_optimizer(stage.optim, 60)
    step = make_step(TINY, stage, tx)
    state, losses = init_state(trainable, tx), []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 * losses[0]
