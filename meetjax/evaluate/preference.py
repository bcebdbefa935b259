"""How often the dialled model prefers what people preferred, on pairs it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from meetjax.data.loader import Buckets, eval_batches
from meetjax.data.tokenize import Rows
from meetjax.evaluate.intervals import wilson
from meetjax.models.config import ModelConfig
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.objectives.reward import compiled_answer_rewards
from meetjax.train.reference import Reference
from meetjax.types import Params


def row_logps(
    config: ModelConfig, params: Params, bank: Any, rows: Rows, buckets: Buckets, batch_size: int = 4
) -> Float[np.ndarray, "N C"]:
    """Summed answer log-probabilities in nats of every row under its gates, or under the bank in full where it has none."""
    return _scored(lambda batch, _: compiled_answer_logps(config, params, bank, batch), rows, buckets, batch_size)


def row_rewards(
    config: ModelConfig, params: Params, bank: Any, rows: Rows, buckets: Buckets, batch_size: int = 4
) -> Float[np.ndarray, "N C"]:
    """The rewards that the bank's head gives to the answers of every row, likewise."""
    return _scored(lambda batch, _: compiled_answer_rewards(config, params, bank, batch), rows, buckets, batch_size)


def base_logps(reference: Reference, rows: Rows, buckets: Buckets, batch_size: int = 4) -> Float[np.ndarray, "N C"]:
    """The log-probabilities under the base model, where not known from before."""
    return _scored(lambda batch, chosen: reference.logps(batch, rows, chosen), rows, buckets, batch_size)


def _scored(score: Callable, rows: Rows, buckets: Buckets, batch_size: int) -> Float[np.ndarray, "N C"]:
    out = np.zeros(rows.starts.shape, np.float64)
    for batch, chosen in eval_batches(rows, batch_size, buckets):
        values = np.asarray(score(batch, chosen))
        real = batch.weights > 0
        out[chosen[real]] = values[real]
    return out


def accuracy(margins: Float[np.ndarray, " N"]) -> dict[str, Any]:
    """Share of positive margins, ties counted half, with the Wilson 95 % interval."""
    wins = float(np.sum(margins > 0) + 0.5 * np.sum(margins == 0))
    return {"accuracy": wins / len(margins), "interval": list(wilson(wins, len(margins))), "n": len(margins)}


def shorter_accuracy(rows: Rows) -> float:
    """How often the answer of fewer tokens is the chosen one, ties counted half: the baseline to beat."""
    return accuracy(np.asarray(np.diff(rows.lengths - rows.starts, axis=1)[:, 0], np.float64))["accuracy"]
