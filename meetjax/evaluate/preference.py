"""How often the dialled model prefers what people preferred, on pairs it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from meetjax.data.loader import Buckets, eval_batches
from meetjax.data.tokenize import Rows
from meetjax.evaluate.intervals import wilson
from meetjax.models.config import ModelConfig
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.objectives.reward import compiled_answer_rewards
from meetjax.train.hosts import own_rows, whole
from meetjax.train.reference import Reference
from meetjax.train.sharding import put_batch
from meetjax.types import BATCH_AXES, Params


def row_logps(
    config: ModelConfig, params: Params, bank: Any, rows: Rows, buckets: Buckets, batch_size: int = 4, mesh: Mesh | None = None
) -> Float[np.ndarray, "N C"]:
    """Summed answer log-probabilities in nats of every row under its gates, or under the bank in full where it has none.

    mesh: splits each batch, of at least a row a place, over its batch axes and so over its hosts; each of them gets all the scores.
    """
    return _scored(_placed(compiled_answer_logps, config, params, bank, mesh), rows, buckets, batch_size, mesh)


def row_rewards(
    config: ModelConfig, params: Params, bank: Any, rows: Rows, buckets: Buckets, batch_size: int = 4, mesh: Mesh | None = None
) -> Float[np.ndarray, "N C"]:
    """The rewards that the bank's head gives to the answers of every row, likewise."""
    return _scored(_placed(compiled_answer_rewards, config, params, bank, mesh), rows, buckets, batch_size, mesh)


def base_logps(
    reference: Reference, rows: Rows, buckets: Buckets, batch_size: int = 4, mesh: Mesh | None = None
) -> Float[np.ndarray, "N C"]:
    """The log-probabilities under the base model, where not known from before, likewise."""
    return _scored(lambda batch, chosen: reference.logps(batch, rows, chosen, mesh), rows, buckets, batch_size, mesh)


def _placed(score: Callable, config: ModelConfig, params: Params, bank: Any, mesh: Mesh | None) -> Callable:
    if mesh is None:
        return lambda batch, _: score(config, params, bank, batch)
    return lambda batch, _: whole(score(config, params, bank, put_batch(batch, mesh)), mesh)


def _scored(score: Callable, rows: Rows, buckets: Buckets, batch_size: int, mesh: Mesh | None) -> Float[np.ndarray, "N C"]:
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    size = -(-batch_size // ways) * ways
    mine = own_rows(mesh, size)
    out = np.zeros(rows.starts.shape, np.float64)
    for batch, chosen in eval_batches(rows, size, buckets):
        values = np.asarray(score(jax.tree.map(lambda leaf: leaf[mine], batch), chosen[mine]))
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
