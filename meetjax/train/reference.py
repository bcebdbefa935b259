"""Reference log-probabilities: the same forward without adapters, computed once for each row and remembered."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from meetjax.data.tokenize import Rows
from meetjax.models.config import ModelConfig
from meetjax.objectives.logps import answer_logps
from meetjax.train.sharding import put_batch
from meetjax.types import Batch, Params

base_logps = partial(jax.jit, static_argnums=0)(lambda config, params, batch: answer_logps(config, params, None, batch))


class Reference:
    """s_ref of every row asked for so far, keyed by the row's content hash; share one between runs on the same base."""

    def __init__(self, config: ModelConfig, params: Params):
        self._config, self._params = config, params
        self._known: dict[str, Float[np.ndarray, " C"]] = {}

    def attach(self, batch: Batch, rows: Rows, chosen: np.ndarray, mesh: jax.sharding.Mesh) -> Batch:
        """The batch with `ref_logps`; batches with a new row cost one forward pass."""
        names = rows.hashes[chosen]
        if any(name not in self._known for name in names):
            values = np.asarray(base_logps(self._config, self._params, put_batch(batch, mesh)))
            self._known.update(zip(names, values, strict=True))
        return dataclasses.replace(batch, ref_logps=np.stack([self._known[name] for name in names]))
