"""Reference log-probabilities: the same forward without adapters, computed once for each batch and remembered."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from meetjax.data.tokenize import Rows
from meetjax.models.config import ModelConfig
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.train.sharding import put_batch
from meetjax.types import Batch, Params


class Reference:
    """s_ref of every batch asked for so far, keyed by its rows' content and its padded length; share one between runs on the same base.

    By batch and not by row: the last bits of a row's score depend on its company, and a resumed run, which meets the batches in
    another order than the run it continues, must see the same bits where a set repeats a row.
    """

    def __init__(self, config: ModelConfig, params: Params):
        self._config, self._params = config, params
        self._known: dict[tuple[str, ...], Float[np.ndarray, "B C"]] = {}

    def attach(self, batch: Batch, rows: Rows, chosen: np.ndarray, mesh: jax.sharding.Mesh) -> Batch:
        """The batch with `ref_logps`; a new batch costs one forward pass."""
        key = (str(batch.tokens.shape), *rows.hashes[chosen])
        if key not in self._known:
            self._known[key] = np.asarray(compiled_answer_logps(self._config, self._params, None, put_batch(batch, mesh)))
        return dataclasses.replace(batch, ref_logps=self._known[key])
