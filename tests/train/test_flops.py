"""The count by hand is what the compiler counts, where it can: in a model of one layer, whose loop runs once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.objectives.preference import Dpo
from meetjax.train.flops import step_flops
from meetjax.train.step import make_gradient, partition
from meetjax.types import Batch
from tests.conftest import TINY, random_bank, random_params

ONE_LAYER = dataclasses.replace(TINY, layers=1, width=1024, hidden=2048, heads=16, kv_heads=8, head_width=64, vocab=2048, remat="dots")
"""Wide enough that products are nearly all there is."""


@pytest.mark.parametrize("base", [False, True], ids=["prompt", "base"])
def test_the_compiled_step_spends_what_is_counted(base):
    """4 pairs behind shared prompts, 64 tokens of prompt and 32 of each answer, so that nothing is padding.

    A soft prompt needs the gradient all the way down; what trains higher up needs less, in a model of many layers hardly so.
    """
    common, answer, pairs, prompt = 64, 32, 4, 8
    starts = np.tile([common, common + answer], (pairs, 1)).astype(np.int32)
    batch = Batch(
        np.full((pairs, 1, common + 2 * answer), 5, np.int32), starts, starts + answer, np.ones(pairs, np.float32),
        ref_logps=np.zeros((pairs, 2), np.float32), common=np.full(pairs, common, np.int32),
    )  # fmt: skip
    params, bank = random_params(ONE_LAYER), random_bank(ONE_LAYER, ("prompt",), entries=(0,), length=prompt)
    trainable, frozen = partition(params, bank, kinds=() if base else ("prompt",), base=base)
    compiled = jax.jit(make_gradient(ONE_LAYER, Dpo())).lower(trainable, frozen, jax.tree.map(jnp.asarray, batch)).compile()
    common += prompt
    seen = common * (common + 1) // 2 + 2 * sum(range(common + 1, common + answer + 1))
    counted = step_flops(ONE_LAYER, pairs * (common + 2 * answer), pairs * seen, pairs * 2 * answer, base)
    if base:
        counted += 2 * ONE_LAYER.vocab * ONE_LAYER.width * pairs * 2 * answer  # a head that trains computes its logits once more
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)
