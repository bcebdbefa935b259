"""The reward model: its loss by hand, whom its gradient reaches, and that neither layout, padding, split nor mesh changes it."""

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
from meetjax.adapters.reward import RewardSpec
from meetjax.adapters.tree import Bank, flatten
from meetjax.errors import MeetjaxError
from meetjax.models.decoder import hidden_states
from meetjax.objectives.reward import BradleyTerry, answer_rewards, bradley_terry_loss
from meetjax.train.optim import make_optimizer
from meetjax.train.sharding import make_mesh, put_batch
from meetjax.train.stage import Optim, Stage
from meetjax.train.step import init_state, make_gradient, partition
from meetjax.types import Batch
from tests.conftest import TINY, assert_close, assert_trees_close, lay_together, random_bank, random_params, shared_step

SMALL = dataclasses.replace(TINY, layers=2)
KINDS = ("lora", "reward")
CENTRED = BradleyTerry(kappa=0.3, margin=0.2)
CHOSEN, REJECTED = (np.random.default_rng(seed).normal(0, 3, 8).astype(np.float32) for seed in (1, 2))


def test_loss_equals_the_formula():
    """-logsigmoid(R_w - R_l - m) + kappa (R_w + R_l)^2, as trl's RewardTrainer has it; ln 2 at a zero head."""
    expected = np.logaddexp(0.0, REJECTED - CHOSEN + 0.2) + 0.3 * (CHOSEN + REJECTED) ** 2
    np.testing.assert_allclose(bradley_terry_loss(CHOSEN, REJECTED, 0.3, 0.2), expected, rtol=1e-5)
    np.testing.assert_allclose(bradley_terry_loss(jnp.zeros(1), jnp.zeros(1), 0.3, 0.0), math.log(2), rtol=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_a_constant_on_both_rewards_changes_nothing_unless_they_are_centred(kappa):
    moved = bradley_terry_loss(CHOSEN + 1, REJECTED + 1, kappa, 0.0) - bradley_terry_loss(CHOSEN, REJECTED, kappa, 0.0)
    assert_close(moved, 4 * kappa * (CHOSEN + REJECTED + 1), factor=4)


def make_batch(rows=4, width=10):
    """Pairs of unequal lengths under gates of two columns; the last row only fills the batch, and padding looks like EOS."""
    draw = np.random.default_rng(5)
    starts = draw.integers(2, 5, (rows, 1)).astype(np.int32).repeat(2, 1)
    ends = draw.integers(6, 11, (rows, 2)).astype(np.int32)
    tokens = draw.integers(3, 97, (rows, 2, 10)).astype(np.int32)
    tokens = np.where(np.arange(10) < starts[..., None], tokens[:, :1], tokens)
    tokens = np.pad(np.where(np.arange(10) < ends[..., None], tokens, 2), ((0, 0), (0, 0), (0, width - 10)), constant_values=2)
    gates = draw.uniform(0.5, 1.5, (rows, 2)).astype(np.float32)
    return Batch(tokens, starts, ends, (np.arange(rows) < rows - 1).astype(np.float32), gates)


@pytest.fixture(scope="module")
def parts():
    """(trainable, frozen): two LoRAs and two heads, none of them neutral."""
    return partition(random_params(SMALL), random_bank(SMALL, KINDS, linear=("q", "down")), kinds=KINDS, base=False)


@functools.cache
def gradient_of(microbatches=1):
    return jax.jit(make_gradient(SMALL, CENTRED, microbatches))


def assert_same(found, expected):
    assert_trees_close(found[0], expected[0], factor=4)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_reward_is_read_at_the_last_token_of_each_answer(parts):
    """Each answer alone, without padding: sum_e g_e u_e . h at its end."""
    params, bank, batch = parts[1].params, parts[0].adapters, make_batch(rows=2)
    found = jax.jit(answer_rewards, static_argnums=0)(SMALL, params, bank, batch)
    for b in range(2):
        for c in range(2):
            tokens = batch.tokens[b, c : c + 1, : batch.ends[b, c]]
            h = hidden_states(SMALL, params, tokens, bank, batch.gates[b : b + 1])[0, -1]
            assert_close(found[b, c], batch.gates[b] @ bank.reward.u @ np.asarray(h))


def test_shared_prompt_equals_a_copy_an_answer(parts):
    assert_same(gradient_of()(*parts, lay_together(make_batch())), gradient_of()(*parts, make_batch()))


def test_pad_invariance(parts):
    assert_same(gradient_of()(*parts, make_batch(width=16)), gradient_of()(*parts, make_batch()))


def test_microbatch_invariance(parts):
    assert_same(gradient_of(2)(*parts, lay_together(make_batch())), gradient_of()(*parts, lay_together(make_batch())))


def test_sharded_equals_single_device(parts):
    batch = lay_together(make_batch(rows=8))
    expected, mesh = gradient_of()(*parts, batch), make_mesh((4, 2, 1))
    with jax.set_mesh(mesh):
        assert_same(gradient_of()(*parts, put_batch(batch, mesh)), expected)


def test_gradient_reaches_the_head_first_and_then_the_trunk():
    """At u = 0 no state matters: loss ln 2, rewards 0. After one step b of LoRA learns, after two its a."""
    params, specs = random_params(SMALL), (LoraSpec(rank=2, sites=("q", "down")), RewardSpec())
    trainable, frozen = partition(params, init_bank(SMALL, params, specs, None, jax.random.key(0)), kinds=KINDS, base=False)
    stage = Stage(specs, BradleyTerry(), Optim(1e-2, warmup=0.0))
    tx, batch = make_optimizer(stage.optim, 10), dataclasses.replace(lay_together(make_batch()), gates=None)
    step, state = shared_step(SMALL, stage, tx, 1), init_state(trainable, tx)
    for moved in ({"u"}, {"u", "b"}, {"u", "b", "a"}):
        before = {path: np.array(leaf) for path, leaf in flatten(state.trainable).items()}
        state, metrics = step(state, frozen, batch)
        after = flatten(state.trainable)
        assert {path[-1] for path in before if not np.array_equal(before[path], after[path])} == moved
        if moved == {"u"}:
            np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-6)
            assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0 and metrics["rewards/accuracies"] == 0.5
    assert metrics["loss"] < math.log(2)


def test_a_bank_without_a_head_is_told():
    with pytest.raises(MeetjaxError, match=r"^rewards: the bank has no reward head; train RewardSpec\(\)"):
        answer_rewards(TINY, random_params(TINY), Bank(), make_batch())
