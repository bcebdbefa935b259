"""What 8 bits a weight cost a real model."""

from __future__ import annotations

import numpy as np

from meetjax.data.tokenize import answer_ids
from meetjax.models.quant import quantize_params
from tests.conftest import forward

GOAL = 0.02
"""|z' - z| / |z| over all logits of real text. With a scale a column instead of a tile, 0.045."""


def test_int8_logits_are_within_two_percent(smollm2, pairs):
    _, rows = pairs
    texts = [answer_ids(rows, n, 0) for n in range(len(rows))]
    width = max(len(ids) for ids in texts)
    tokens = np.stack([np.pad(ids, (0, width - len(ids))) for ids in texts])
    real = np.arange(width)[None] < np.array([len(ids) for ids in texts])[:, None]
    whole, found = (
        np.asarray(forward(smollm2.config, params, tokens))[real] for params in (smollm2.params, quantize_params(smollm2.params, "int8"))
    )
    error = np.linalg.norm(found - whole) / np.linalg.norm(whole)
    assert 1e-4 < error < GOAL
