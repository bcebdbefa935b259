"""Reference log-probabilities: the same forward without adapters, computed once for each batch and remembered."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from meetjax.data.tokenize import Rows
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.train.hosts import own_rows, whole
from meetjax.train.sharding import put_batch
from meetjax.types import Batch, Params


class Reference:
    """s_ref of every batch asked for so far, keyed by its rows' content and its shape; share one between runs on the same base.

    By batch and not by row: the last bits of a row's score depend on its company, and a resumed run, which meets the batches in
    another order than the run it continues, must see the same bits where a set repeats a row. Of several hosts each asks for its
    own rows of the same batch at the same time.
    """

    def __init__(self, config: ModelConfig, params: Params, adapters: Any = None, *, file: Path | None = None, fingerprint: str = ""):
        """Kept in memory, and in `file` between runs where one is given: scores of the base with this fingerprint.

        adapters: a bank that belongs to the reference, under the batch's gates; its scores are kept in memory only.

        A key names all that a score depends on (base, dtypes, token ids, places of the answers, shapes, mesh, backend, JAX and the
        code of the forward pass; of the base's weights the fingerprint is a sample), so that no entry is stale. Several hosts keep scores
        in memory only: a file that one of them has and another lacks would leave the others waiting in the forward pass. Raises
        MeetjaxError when the file cannot be used.
        """
        self._model = config, params, adapters
        self._known: dict[str, Float[np.ndarray, "B C"]] = {}
        self._tables: dict[int, tuple[Rows, str]] = {}
        held = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})  # integers too, where the base is quantised
        self._base = [fingerprint, repr(config), str(held), jax.default_backend(), jax.__version__, _code()]
        self._store = None if file is None or adapters is not None or jax.process_count() > 1 else _Store(file)

    def logps(self, batch: Batch, rows: Rows, chosen: np.ndarray, mesh: jax.sharding.Mesh | None = None) -> Float[np.ndarray, "B C"]:
        """Summed answer log-probabilities in nats under the base, those of all hosts' rows; a new batch costs one forward pass."""
        gates = "" if batch.gates is None or self._model[2] is None else np.asarray(batch.gates).tobytes().hex()
        layout = [str(dict(mesh.shape)) if mesh else "", str(batch.tokens.shape), gates]
        if jax.process_count() > 1:
            # Indices and not content: all hosts must find or miss a batch together, and no two batches hold a row of one index.
            layout += [self._digest(rows), chosen.tobytes().hex()]
        key = hashlib.sha256("\n".join([*self._base, *layout, *rows.hashes[chosen]]).encode()).hexdigest()
        if key not in self._known:
            found = None if self._store is None else self._store.get(key)
            if found is None:
                placed = put_batch(batch, mesh) if mesh else batch
                scores = compiled_answer_logps(*self._model, placed)
                scores = np.asarray(whole(scores, mesh) if mesh and jax.process_count() > 1 else scores)
                if self._store is not None:
                    self._store.put(key, scores)
            else:
                scores = found.reshape(batch.starts.shape)
            self._known[key] = scores
        return self._known[key]

    def _digest(self, rows: Rows) -> str:
        if id(rows) not in self._tables:  # the table itself is kept, so that its id stays its own
            self._tables[id(rows)] = rows, hashlib.sha256("".join(rows.hashes).encode()).hexdigest()
        return self._tables[id(rows)][1]

    def attach(self, batch: Batch, rows: Rows, chosen: np.ndarray, mesh: jax.sharding.Mesh) -> Batch:
        """The batch with `ref_logps`, this host's rows."""
        scores = self.logps(batch, rows, chosen, mesh)
        return dataclasses.replace(batch, ref_logps=scores[own_rows(mesh, len(scores))])


class _Store:
    """Arrays of float32 by key in one file; several runs may use it at a time."""

    def __init__(self, file: Path):
        self._file = file
        with self._named():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(file, timeout=60, isolation_level=None)
            self._connection.execute("create table if not exists scores (key text primary key, value blob) without rowid")

    def get(self, key: str) -> Float[np.ndarray, " M"] | None:
        with self._named():
            found = self._connection.execute("select value from scores where key = ?", (key,)).fetchone()
        return None if found is None else np.frombuffer(found[0], "<f4")

    def put(self, key: str, scores: Float[np.ndarray, "B C"]) -> None:
        with self._named():
            self._connection.execute("insert or replace into scores values (?, ?)", (key, scores.astype("<f4").tobytes()))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            fix = "delete it or set MEETJAX_CACHE to a folder that can be written"
            expected = "a cache of reference scores that can be read and written"
            raise MeetjaxError(f"{self._file}", expected=expected, found=error, fix=fix) from error


@functools.cache
def _code() -> str:
    """Digest of the code that a score comes from."""
    package = Path(__file__).parent.parent
    files = sorted((*package.glob("models/*.py"), *package.glob("objectives/*.py"), package / "types.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
