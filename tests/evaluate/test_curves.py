"""The dial's curve against the scores that training and evaluation use."""

import numpy as np
import pytest

from meetjax.data.records import Pair
from meetjax.data.tokenize import tokenize_records
from meetjax.evaluate.curves import dial_curve
from meetjax.evaluate.preference import row_logps
from tests.conftest import random_bank

ROUNDING = 1e-3
"""Nats, on sums over a dozen tokens: the head sees other batches of positions here than in `row_logps`."""


@pytest.mark.parametrize("kind", ["prompt", "lora", "edit", "identity"])
def test_curve_is_0_at_the_base_and_the_reward_margin_at_1(model, kind):
    pairs = [Pair(f"{n} cat?", "the mat", "a cat on the mat", f"f:{n}") for n in range(3)]
    rows, _ = tokenize_records(pairs, model.tokenizer, 64)
    bank = random_bank(model.config, (kind,), entries=(0,))
    zero, one = dial_curve(model.config, model.params, bank, rows, (64,), (0.0, 1.0), batch_size=2)
    ratio = (row_logps(model.config, model.params, bank, rows, (64,)) - row_logps(model.config, model.params, None, rows, (64,))) @ [1, -1]
    assert abs(zero["reward_margin"]) < ROUNDING and abs(zero["kl"]) < ROUNDING
    np.testing.assert_allclose(one["reward_margin"], ratio.mean(), atol=ROUNDING)
    assert abs(one["reward_margin"]) > 3 * ROUNDING and one["kl"] > 0
