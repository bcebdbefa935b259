"""The running batch: which request has which rows, how many cells the caches have, and the prefill of a request that joins."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from meetjax.generate.sampling import RowSampling
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import Cache
from meetjax.serve import programs
from meetjax.serve.prefix import CHUNK, PrefixCache, block_keys
from meetjax.serve.room import Loaded, Shelf, Way
from meetjax.serve.stream import Stream
from meetjax.serve.text import Writer
from meetjax.types import Array, Params

LEAST_CELLS, TAIL, SHRINK_AFTER = 128, 16, 64
"""Cells of the smallest caches; tokens of the smaller of the two prefill programs, for the end of a prompt; steps for which fewer
cells have to be enough before there are fewer."""


@dataclasses.dataclass(eq=False)
class Request:
    """An open request: its stream, the rows that it needs, and those that it has (row, filled cells)."""

    stream: Stream
    ways: list[Way]
    loaded: list[Loaded]
    writer: Writer
    begun: float
    rows: dict[int, int] = dataclasses.field(default_factory=dict)
    ended: bool = False


def cell_counts(columns: int, capacity: int) -> list[int]:
    """How many cells a cache may have: powers of two, and what the longest request needs, soft prompts included."""
    most = -(-(columns + -(-capacity // CHUNK) * CHUNK) // LEAST_CELLS) * LEAST_CELLS
    counts = [LEAST_CELLS]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return counts


def sampling_of(requests: list[Request | None]) -> RowSampling:
    """Sampling settings of some rows, greedy where there is no request."""
    settings = [None if request is None else request.stream.ask for request in requests]
    return RowSampling(
        np.asarray([0.0 if ask is None else ask.sampling.temperature for ask in settings], np.float32),
        np.asarray([0 if ask is None else ask.sampling.top_k for ask in settings], np.int32),
        np.asarray([1.0 if ask is None else ask.sampling.top_p for ask in settings], np.float32),
        np.asarray([0 if ask is None else ask.seed for ask in settings], np.int32),
    )


class Prefill:
    """The prompt of one request, run chunk by chunk into caches of a single row, one for each row that the request needs.

    Alone in its programs and always cut at the same places, a prompt gives the same bits in any company and behind any hit.
    """

    def __init__(self, config: ModelConfig, params: Params, shelf: Shelf, prefix: PrefixCache, cells: list[int], request: Request):
        self.config, self.params, self.shelf, self.prefix, self.cells, self.request = config, params, shelf, prefix, cells, request
        self.stages: list[Cache] = []
        self.hidden: list[Array] = []
        self._done = 0
        self._keys: list[bytes] = []

    @property
    def finished(self) -> bool:
        return len(self.hidden) == len(self.request.ways)

    def run(self) -> None:
        """One chunk more of the row at hand."""
        way, ids = self.request.ways[len(self.hidden)], self.request.stream.ask.ids
        columns = self.columns(way)
        if len(self.stages) == len(self.hidden):
            self._keys = block_keys(ids, way.name)
            self._begin(columns, columns + -(-len(ids) // CHUNK) * CHUNK)
        begin, end = self._done, min(self._done + CHUNK, len(ids))
        hidden, stage = self._chunk(way, np.asarray(ids[begin:end], np.int32), columns)
        self._done = end
        place = begin // CHUNK
        if place < len(self._keys) and self.prefix.wants(self._keys[place]):
            size = CHUNK + (columns if place == 0 else 0)
            start = 0 if place == 0 else columns + begin
            self.prefix.add(self._keys[place], programs.cut(stage, np.int32(start), size))
        self.stages[-1] = stage
        if end == len(ids):
            self.hidden.append(hidden)
            self._done = 0

    def columns(self, way: Way) -> int:
        """Cells of the soft prompts in front of this row's text."""
        return self.shelf.room.prompts_at_once * self.shelf.room.prompt_length if way.prompts else 0

    def _begin(self, columns: int, need: int) -> None:
        """An empty cache, or one with the chunks that are known."""
        cells = next(count for count in self.cells if count >= need)
        stage = programs.empty(self.config, programs.identity_names(self.shelf.bank), (1, cells))
        for place, block in enumerate(self.prefix.find(self._keys)):
            stage = programs.paste(stage, block, np.int32(0 if place == 0 else columns + place * CHUNK))
            self._done += CHUNK
        self.stages.append(stage)

    def _chunk(self, way: Way, ids: np.ndarray, columns: int) -> tuple[Array, Cache]:
        width = TAIL if len(ids) <= TAIL else CHUNK
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        length, gates = np.asarray([len(ids)], np.int32), np.asarray([way.gates], np.float32)
        common = (tokens, length, gates, np.asarray([way.enters], np.int32))
        bank, stage = self.shelf.bank, self.stages[-1]
        if columns == 0 or self._done > 0:
            return programs.run_chunk(self.config, self.params, bank, stage, *common)
        room = self.shelf.room.prompts_at_once
        chosen, strengths = np.zeros(room, np.int32), np.zeros((1, room), np.float32)
        for n, (place, strength) in enumerate(way.prompts):
            chosen[n], strengths[0, n] = place, strength
        assert self.shelf.vectors is not None
        hidden, begun = programs.begin_chunk(self.config, width, self.params, bank, self.shelf.vectors, chosen, strengths, *common)
        return hidden, programs.resize(begun, stage.cells.bias.shape[1])


class Rows:
    """The batch on the device and what the host knows of it."""

    def __init__(self, config: ModelConfig, params: Params, shelf: Shelf, slots: int, cells: list[int]):
        self.config, self.params, self.shelf, self.slots, self.cells = config, params, shelf, slots, cells
        self.most_ways = min(slots, 2 + shelf.room.identities)
        self.owners: list[Request | None] = [None] * slots
        self.going = self.fresh(cells[0])
        self._lanes: Any = None
        self._idle_cells = 0

    def fresh(self, cells: int) -> programs.Going:
        """An empty batch."""
        cache = programs.empty(self.config, programs.identity_names(self.shelf.bank), (self.slots, cells))
        return programs.Going(cache, jax.device_put(np.zeros(self.slots, np.int32)), jax.device_put(np.zeros(self.slots, np.int32)))

    @property
    def free(self) -> list[int]:
        return [row for row, owner in enumerate(self.owners) if owner is None]

    @property
    def requests(self) -> list[Request]:
        """Requests with rows, each once."""
        return list({id(owner): owner for owner in self.owners if owner is not None}.values())

    def join(self, request: Request, prefill: Prefill) -> programs.Made:
        """Puts a prefilled request into free rows; returns its first token."""
        need = max(stage.cells.bias.shape[1] for stage in prefill.stages)
        self._fit(need)
        weights = np.asarray([[way.weight for way in request.ways]], np.float32)
        reported = np.asarray([request.stream.ask.logprobs > 0])
        made = programs.first_token(self.params, prefill.hidden, weights, sampling_of([request]), reported)
        for row, stage, way in zip(self.free, prefill.stages, request.ways, strict=False):
            self.going = programs.insert(self.going, stage, np.int32(row), made.token)
            self.owners[row] = request
            request.rows[row] = prefill.columns(way) + len(request.stream.ask.ids)
        self._lanes = None
        return made

    def release(self, request: Request) -> None:
        """Frees its rows."""
        for row in request.rows:
            self.owners[row] = None
        request.rows = {}
        self._lanes = None

    def step(self) -> programs.Made:
        """One decoding step, not waited for."""
        need = 1 + max(filled for request in self.requests for filled in request.rows.values())
        fewer = need <= self._below()
        self._idle_cells = self._idle_cells + 1 if fewer else 0
        self._fit(need, shrink=self._idle_cells >= SHRINK_AFTER)
        if self._lanes is None:
            self._lanes = jax.device_put(self.make_lanes())
        self.going, made = programs.decode(self.config, self.params, self.shelf.bank, self.going, self._lanes)
        for request in self.requests:
            request.rows = {row: filled + 1 for row, filled in request.rows.items()}
        return made

    def _count(self) -> int:
        return self.going.cache.cells.bias.shape[1]

    def _below(self) -> int:
        """The next smaller number of cells, 0 for none."""
        place = self.cells.index(self._count())
        return self.cells[place - 1] if place else 0

    def _fit(self, need: int, shrink: bool = False) -> None:
        while self._count() < need:
            self._resize(self.cells[self.cells.index(self._count()) + 1])
        if shrink:
            self._resize(self._below())
            self._idle_cells = 0

    def _resize(self, cells: int) -> None:
        self.going = self.going._replace(cache=programs.resize(self.going.cache, cells))

    def make_lanes(self) -> programs.Lanes:
        """What the rows want now."""
        slots, most = self.slots, self.most_ways
        gates, enters = np.zeros((slots, self.shelf.columns), np.float32), np.full(slots, -1, np.int32)
        parts = np.broadcast_to(np.arange(slots, dtype=np.int32)[:, None], (slots, most)).copy()
        weights, leader = np.zeros((slots, most), np.float32), np.arange(slots, dtype=np.int32)
        weights[:, 0] = 1
        for request in self.requests:
            rows = list(request.rows)
            for row, way in zip(rows, request.ways, strict=True):
                gates[row], enters[row], leader[row] = way.gates, way.enters, rows[0]
            parts[rows[0], : len(rows)] = rows
            weights[rows[0], : len(rows)] = [way.weight for way in request.ways]
        active = np.asarray([owner is not None for owner in self.owners])
        reported = np.asarray([owner is not None and owner.stream.ask.logprobs > 0 for owner in self.owners])
        return programs.Lanes(active, gates, enters, parts, weights, leader, sampling_of(self.owners), reported)
