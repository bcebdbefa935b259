"""One normaliser for the whole batch: the same loss, metrics and gradient for every split, whatever the objective sums over."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.figa import Figa
from meetjax.objectives.kto import Kto
from meetjax.objectives.preference import Dpo
from meetjax.objectives.representation import Rahf
from meetjax.objectives.sft import ConditionalSft
from meetjax.objectives.table import OBJECTIVES
from meetjax.train.step import PART, Parts, choose_microbatches, make_gradient, partition
from meetjax.types import Batch
from tests.conftest import TINY, assert_trees_close, random_bank, random_params

ROWS, WIDTH = 8, 10
SMALL = dataclasses.replace(TINY, layers=2)
ROUNDING = 1e-5
"""Float32 sums of order 1 in another order, relative."""


def make_batch(answers):
    """Rows of unequal lengths and classes; the last quarter only fills, and so is one part of a split into four."""
    draw = np.random.default_rng(4)
    lengths = draw.integers(5, WIDTH + 1, (ROWS, answers)).astype(np.int32)
    return Batch(
        tokens=draw.integers(3, 97, (ROWS, answers, WIDTH)).astype(np.int32),
        starts=draw.integers(2, 4, (ROWS, answers)).astype(np.int32),
        ends=lengths,
        weights=np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32),
        ref_logps=draw.normal(-20, 3, (ROWS, answers)).astype(np.float32),
        classes=np.array([1, 1, 1, 0, 1, 1, 0, 0], np.int32),
        token_weights=draw.choice([-1.0, 0.0, 1.0], (ROWS, answers, WIDTH)).astype(np.float32),
    )


def answers_of(objective):
    if asks := getattr(objective, "asks", ()):
        return len(asks)
    return 2 if objective.form in ("pair", "edited") or getattr(objective, "partners", False) else 1


def part_of(tree, part, parts):
    return jax.tree.map(lambda leaf: leaf[part * len(leaf) // parts : (part + 1) * len(leaf) // parts], tree)


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if not getattr(kind, "reads_states", False)])
def test_sums_of_the_parts_are_the_sums_of_the_whole(name):
    """Every objective: loss, normaliser and metrics add up over a split, given what the whole batch pools."""
    objective = OBJECTIVES[name]()
    batch = make_batch(answers_of(objective))
    shape = (ROWS * batch.tokens.shape[1], WIDTH) if getattr(objective, "reads_tokens", False) else batch.starts.shape
    scores = np.random.default_rng(6).normal(-0.7, 0.3, shape).astype(np.float32) * (1 if len(shape) == 2 and shape[1] == WIDTH else 25)
    pooled = ()
    if hasattr(objective, "pool"):
        total, weight = objective.pool(scores, batch)
        pooled = (total / weight,)
    whole = objective(jnp.asarray(scores), batch, *pooled)
    parts = [objective(jnp.asarray(part_of(scores, i, 4)), part_of(batch, i, 4), *pooled) for i in range(4)]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING, err_msg=name), summed, whole)
    own = [float(part[0] / jnp.maximum(part[1], 1)) for part in parts]
    assert abs(np.mean(own) - float(whole[0] / whole[1])) > 1e-3, "a mean of the parts' means would not do"


@pytest.mark.parametrize("objective", [Figa(threshold=9.0), ConditionalSft(), Rahf(taps=(1, 2))], ids=lambda o: type(o).__name__)
def test_same_gradient_for_every_split(objective):
    """Through the model, where the normaliser is neither pairs nor the tokens of an answer; the others have tests of their own."""
    batch, teacher = make_batch(answers_of(objective)), random_bank(SMALL, ("edit",), entries=(0,), editable=("down",))
    bank = random_bank(SMALL, ("lora",), entries=(0,), linear=("q", "down"))
    trainable, frozen = partition(random_params(SMALL), bank, kinds=("lora",), base=False)
    frozen = Parts(frozen.params, frozen.adapters, teacher)
    runs = [jax.jit(make_gradient(SMALL, objective, n))(trainable, frozen, batch) for n in (1, 4)]
    (whole, metrics), (split, split_metrics) = runs
    assert_trees_close(split, whole)
    assert float(np.abs(whole.adapters.lora.q.a).max()) > 0
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=ROUNDING, err_msg=name)


def test_the_rule_keeps_parts_small():
    assert [choose_microbatches(Dpo(), 8, tokens) for tokens in (PART // 8, PART // 8 + 1, PART // 2, PART // 2 + 1, 4 * PART)] == [
        1,
        2,
        4,
        8,
        8,
    ]
    assert choose_microbatches(Dpo(), 7, PART // 2) == 7 and choose_microbatches(Kto(), 8, PART) == 1
    batch = make_batch(2)
    batch = dataclasses.replace(batch, tokens=np.pad(batch.tokens, ((0, 0), (0, 0), (0, 200))))
    trainable, frozen = partition(random_params(SMALL), random_bank(SMALL, ("edit",), entries=(0,)), kinds=("edit",), base=False)
    assert choose_microbatches(Dpo(), *batch.tokens.reshape(ROWS, -1).shape) == 4
    by_rule, whole = (make_gradient(SMALL, Dpo(), n) for n in (0, 1))
    assert_trees_close(jax.jit(by_rule)(trainable, frozen, batch)[0], jax.jit(whole)(trainable, frozen, batch)[0])
