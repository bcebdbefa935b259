"""Laws of the training step: what moves and what does not, and that no split, order, padding or mesh changes the gradient."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.tree import Bank, count_parameters
from meetjax.errors import MeetjaxError
from meetjax.models.decoder import unstack
from meetjax.objectives.logps import answer_logps
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.optim import learning_rate, make_optimizer
from meetjax.train.sharding import base_shardings, make_mesh, put_batch, state_shardings
from meetjax.train.stage import Optim, Stage
from meetjax.train.step import State, init_state, join, make_gradient, make_loss, make_step, partition
from meetjax.types import Batch
from tests.conftest import MOVING, TINY, assert_trees_close, lay_together, random_bank, random_params

SMALL = dataclasses.replace(TINY, layers=2, vocab=98)
"""98: the vocabulary divides by the model axis of a mesh."""
RATES = {"prompt": 1e-2, "lora": 1e-2, "edit": 3e-2, "identity": 1e-2, "base": 3e-3}
GRADIENT = 1e-5
"""Of the largest gradient of a leaf: float32 sums over rows and features in another order."""
STEPS = 15


def small_bank(kinds=MOVING):
    """One adapter a kind at few sites, so that programs compile quickly; nothing neutral, LoRA's b among it."""
    return random_bank(SMALL, kinds, entries=(0,), linear=("q", "down"), editable=("down",))


def scale(bank, factor):
    return jax.tree.map(lambda leaf: leaf * factor, bank)


def neutral(kind):
    """A bank of one kind where it starts in training (a soft prompt has no such place: it moves the model at once)."""
    bank = small_bank((kind,))
    if kind == "lora":
        return scale(bank, jnp.float32(0.5))
    return bank if kind == "prompt" else scale(bank, jnp.float32(0.1))


def make_batch(objective, rows=4, width=10, seed=5, shared=False):
    """Answers of unequal lengths; the last row only fills the batch; for pairs the reference scores are near the model's."""
    draw, answers = np.random.default_rng(seed), 2 if objective is Dpo else 1
    lengths = draw.integers(5, 11, (rows, answers)).astype(np.int32)
    tokens = draw.integers(3, 97, (rows, answers, 10)).astype(np.int32)
    tokens = np.where(np.arange(10) < lengths[..., None], tokens, 0)
    tokens = np.pad(tokens, ((0, 0), (0, 0), (0, width - 10)), constant_values=7)
    starts = draw.integers(2, 5, (rows, 1)).astype(np.int32).repeat(answers, 1)
    tokens = np.where(np.arange(width) < starts[..., None], tokens[:, :1], tokens)  # all answers to a prompt share its tokens
    weights = np.ones(rows, np.float32)
    weights[-1] = 0.0
    ref_logps = -5 * (lengths - starts).astype(np.float32) if objective is Dpo else None
    gates = draw.uniform(0.5, 1.5, (rows, 1)).astype(np.float32)
    batch = Batch(tokens, starts, lengths, weights, gates, ref_logps)
    return lay_together(batch) if shared else batch


@functools.cache
def gradient_of(objective, microbatches=1):
    return jax.jit(make_gradient(SMALL, objective(), microbatches))


@functools.cache
def step_of(kind):
    """(optimiser, the step of a one-kind DPO stage)."""
    stage = Stage((), Dpo(), Optim(learning_rate=RATES[kind], schedule="constant", warmup=0.0))
    tx = make_optimizer(stage.optim, STEPS)
    return tx, make_step(SMALL, stage, tx)


scores = jax.jit(answer_logps, static_argnums=0)


def run_steps(kind, bank, params, batch, count):
    """(params, bank, every step's metrics) after `count` steps that train `kind` alone."""
    tx, step = step_of(kind)
    named = {"kinds": (), "base": True} if kind == "base" else {"kinds": (kind,), "base": False}
    trainable, frozen = partition(params, bank, **named)
    state, history = init_state(jax.tree.map(jnp.copy, trainable), tx), []
    for _ in range(count):
        state, metrics = step(state, frozen, batch)
        history.append(metrics)
    return *join(state.trainable, frozen), history


def with_other(kind, factor):
    """A bank of `kind` and, frozen beside it, another kind scaled by `factor`."""
    other = "lora" if kind in ("edit", "base") else "edit"
    beside = getattr(scale(small_bank((other,)), jnp.float32(factor)), other)
    bank = Bank() if kind == "base" else neutral(kind)
    return dataclasses.replace(bank, **{other: beside}), other


@pytest.mark.parametrize("kind", [*MOVING, "base"])
def test_only_trainable_moves(kind):
    """Three steps: every leaf of what trains has moved, every other leaf of bank and base is the same bit for bit."""
    params, (bank, other) = random_params(SMALL), with_other(kind, 1.0)
    copies = jax.tree.map(np.array, (params, bank))
    new_params, new_bank, _ = run_steps(kind, bank, params, make_batch(Dpo), 3)
    moved = {name: (getattr(copies[1], name), getattr(new_bank, name)) for name in MOVING if getattr(bank, name) is not None}
    moved["base"] = (copies[0], new_params)
    assert moved.keys() == {kind, other, "base"}
    for name, (before, after) in moved.items():
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert np.array_equal(old, new) == (name != kind), name
    jax.tree.map(np.testing.assert_array_equal, (params, bank), copies)  # nothing passed in was donated either


@pytest.mark.parametrize("kind", [*MOVING, "base"])
def test_loss_falls_on_a_toy_preference_task(kind):
    """One batch of pairs, learnt by heart: the loss falls from ln 2 (about, for a prompt), margins and accuracy rise."""
    params, (bank, _) = random_params(SMALL), with_other(kind, 0.0)
    batch = make_batch(Dpo)
    batch = dataclasses.replace(batch, ref_logps=np.asarray(scores(SMALL, params, None, batch)))
    *_, history = run_steps(kind, bank, params, batch, STEPS)
    losses, margins = ([float(metrics[name]) for metrics in history] for name in ("loss", "rewards/margins"))
    assert losses[-1] < 0.8 * losses[0]
    assert margins[-1] > margins[0] + 0.1
    assert float(history[-1]["rewards/accuracies"]) == 1.0
    assert all(math.isfinite(float(metrics["grad_norm"])) for metrics in history)


@pytest.mark.parametrize("kind", [*MOVING, "base"])
def test_optimizer_state_has_trainable_structure(kind):
    """Two moments for every number that trains, a few scalars, and nothing of the size of anything else."""
    params, bank = random_params(SMALL), small_bank()
    trainable, _ = partition(params, bank, kinds=() if kind == "base" else (kind,), base=kind == "base")
    state = jax.eval_shape(lambda: make_optimizer(Optim(), 10).init(trainable))
    structure = jax.tree.structure(trainable)
    moments = [node for node in jax.tree.leaves(state, is_leaf=lambda node: jax.tree.structure(node) == structure) if node is not None]
    moments = [node for node in moments if jax.tree.structure(node) == structure]
    assert len(moments) == 2
    for moment in moments:
        assert jax.tree.map(jnp.shape, moment) == jax.tree.map(jnp.shape, trainable)
    scalars = count_parameters(state) - 2 * count_parameters(trainable)
    assert 0 < scalars < 10


@pytest.fixture(scope="module")
def parts():
    """(trainable, frozen): LoRA with B != 0 and an edit train on a frozen base."""
    return partition(random_params(SMALL), small_bank(("lora", "edit")), kinds=("lora", "edit"), base=False)


FORMS = pytest.mark.parametrize(("objective", "shared"), [(Sft, False), (Dpo, False), (Dpo, True)], ids=["sft", "dpo", "dpo-shared"])


@pytest.mark.parametrize("kind", [*MOVING, "base"])
def test_shared_prompt_equals_a_copy_an_answer(kind):
    """Loss, metrics and gradients of every kind: a prompt computed once is the prompt computed for each answer."""
    params, bank = random_params(SMALL), small_bank()
    parts = partition(params, bank, kinds=() if kind == "base" else (kind,), base=kind == "base")
    (apart, expected), (together, found) = (gradient_of(Dpo)(*parts, make_batch(Dpo, shared=shared)) for shared in (False, True))
    assert_trees_close(together, apart, factor=4)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=GRADIENT, atol=GRADIENT, err_msg=name)


@pytest.mark.parametrize("microbatches", [2, 4])
@FORMS
def test_microbatch_invariance(parts, objective, shared, microbatches):
    """The same gradient and metrics for every split, though rows differ in length and weight and one split is all filling."""
    batch = make_batch(objective, shared=shared)
    whole, metrics = gradient_of(objective)(*parts, batch)
    split, split_metrics = gradient_of(objective, microbatches)(*parts, batch)
    assert_trees_close(split, whole)
    assert metrics.keys() == split_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=GRADIENT, err_msg=name)


@FORMS
def test_batch_order_invariance(parts, objective, shared):
    batch, order = make_batch(objective, shared=shared), np.array([2, 0, 3, 1])
    whole, metrics = gradient_of(objective)(*parts, batch)
    shuffled, again = gradient_of(objective)(*parts, jax.tree.map(lambda leaf: leaf[order], batch))
    assert_trees_close(shuffled, whole)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=GRADIENT)


def test_pad_invariance(parts):
    """Six more columns of padding, whatever they hold, leave the gradient alone."""
    whole, metrics = gradient_of(Dpo)(*parts, make_batch(Dpo))
    padded, again = gradient_of(Dpo)(*parts, make_batch(Dpo, width=16))
    assert_trees_close(padded, whole)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=GRADIENT)


def test_filled_up_rows_have_no_gradient(parts):
    """The row of weight 0 may hold anything."""
    batch = make_batch(Dpo)
    other = dataclasses.replace(batch, tokens=np.concatenate([batch.tokens[:-1], batch.tokens[-1:] + 1]))
    jax.tree.map(np.testing.assert_array_equal, gradient_of(Dpo)(*parts, batch), gradient_of(Dpo)(*parts, other))


@pytest.mark.parametrize("bank", [None, Bank(), small_bank(("edit",))], ids=["none", "empty", "another kind"])
def test_zero_trainable_raises(bank):
    with pytest.raises(MeetjaxError, match="zero trainable leaves"):
        partition(random_params(SMALL), bank, kinds=("lora",), base=False)


def test_warm_up_ends_at_the_peak_and_decays():
    """Rates of a 10-step stage with a fifth of warm-up: thirds up to the peak, then each schedule's own way down."""
    rates = {}
    for schedule in ("cosine", "linear", "constant"):
        tx, rates[schedule] = make_optimizer(Optim(learning_rate=0.3, schedule=schedule, warmup=0.2, clip=0.0), 10), []
        state = tx.init(jnp.zeros(()))
        for _ in range(10):
            _, state = tx.update(jnp.ones(()), state, jnp.zeros(()))
            rates[schedule].append(float(learning_rate(state)))
        np.testing.assert_allclose(rates[schedule][:3], [0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(rates["linear"][3:], [0.3 * (1 - i / 8) for i in range(1, 8)], rtol=1e-5)
    np.testing.assert_allclose(rates["cosine"][3:], [0.15 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 8)], rtol=1e-5)
    np.testing.assert_allclose(rates["constant"][3:], 0.3, rtol=1e-6)


def sharded_step(shape, order):
    """State and metrics after one step of every kind on a mesh (None: one device), with their gradients in the first moment."""
    tx, step = step_of("lora")
    params, bank = random_params(SMALL), small_bank()
    trainable, frozen = partition(params, bank, kinds=MOVING, base=False)
    batch = make_batch(Dpo, rows=8, shared=True)
    if shape is None:
        return step(init_state(trainable, tx), frozen, batch)
    mesh = make_mesh(shape, [jax.devices()[i] for i in order])
    with jax.set_mesh(mesh):
        frozen = dataclasses.replace(frozen, params=jax.device_put(params, base_shardings(SMALL, mesh)))
        state = init_state(jax.tree.map(jnp.copy, trainable), tx)
        places = state_shardings(SMALL, state, mesh)
        state, metrics = step(jax.device_put(state, places), frozen, put_batch(batch, mesh))
    jax.tree.map(lambda leaf, place: None if leaf.sharding.is_equivalent_to(place, leaf.ndim) else pytest.fail(str(place)), state, places)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, params)
    return state, metrics


@pytest.fixture(scope="module")
def on_one_device():
    state, metrics = sharded_step(None, ())
    return jax.tree.map(np.asarray, state), metrics


def first_moment(state: State):
    (moment,) = [node.mu for node in jax.tree.leaves(state.opt_state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(node, "mu")]
    return moment


def assert_same_step(found: tuple[State, dict], expected: tuple[State, dict]):
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=GRADIENT, atol=GRADIENT, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(first_moment(found[0])), jax.tree.leaves(first_moment(expected[0])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=GRADIENT * np.abs(theirs).max())
    # Adam's first step is the sign of the gradient: where that is rounding noise, so is the step.
    trained = (jax.tree.leaves(tree) for tree in (first_moment(expected[0]), found[0].trainable, expected[0].trainable))
    for first, ours, theirs in zip(*trained, strict=True):
        clear = np.abs(first) > 1e-2 * np.abs(first).max()
        assert clear.mean() > 0.3
        np.testing.assert_allclose(np.asarray(ours)[clear], theirs[clear], rtol=0, atol=GRADIENT)


@pytest.mark.parametrize("shape", ["fsdp", "fsdp-tensor", "multi-slice", (8, 1, 1)], ids=str)
def test_sharded_equals_single_device(on_one_device, shape):
    """Every kind, pairs behind shared prompts: loss, metrics, gradients; the base stays as it was, the state where it was."""
    assert_same_step(sharded_step(shape, range(8)), on_one_device)


@pytest.mark.parametrize("order", [(3, 0, 6, 1, 7, 4, 2, 5), (7, 6, 5, 4, 3, 2, 1, 0)], ids=str)
def test_mesh_permutation_invariant(on_one_device, order):
    assert_same_step(sharded_step("multi-slice", order), on_one_device)


@pytest.mark.parametrize(("shape", "what"), [((1, 1, 9), "train.mesh"), ((-1, -1, 1), "train.mesh"), ((2, 2), "train.mesh")], ids=str)
def test_bad_mesh_raises(shape, what):
    with pytest.raises(MeetjaxError, match=what):
        make_mesh(shape)


def test_batch_that_does_not_divide_raises():
    with pytest.raises(MeetjaxError, match=r"train\.batch_size; expected a multiple of data x fsdp = 8; found 4"):
        put_batch(make_batch(Dpo), make_mesh((4, 2, 1)))


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_no_flops_for_the_frozen_base():
    """Layers unrolled so that all are counted: backward to the activations only, i.e. twice the forward and not three times."""
    config = dataclasses.replace(TINY, width=64, hidden=192, heads=4, head_width=16, layers=2)
    params = unstack(random_params(config))
    batch = make_batch(Sft, rows=16, width=16)
    loss = make_loss(config, Sft())
    counts = {}
    for kind in ("lora", "base"):
        bank = random_bank(config, ("lora",), entries=(0,))
        parts = partition(params, bank, kinds=("lora",) if kind == "lora" else (), base=kind == "base")
        counts[kind] = flops(lambda *a: jax.grad(loss, has_aux=True)(*a)[0], *parts, batch) / flops(lambda *a: loss(*a)[0], *parts, batch)
    assert counts["lora"] < 2.3
    assert counts["base"] > 2.7  # the count would have seen the base's gradient
