"""Compiling everything that the engine may ever run before it is asked for anything."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from meetjax.models.config import ModelConfig
from meetjax.serve import programs
from meetjax.serve.prefix import CHUNK
from meetjax.serve.room import Shelf
from meetjax.serve.rows import TAIL, Rows, sampling_of
from meetjax.types import Params


def run_all(config: ModelConfig, params: Params, shelf: Shelf, rows: Rows, cells: list[int]) -> None:
    """Runs every program on nothing, in every size that can come. A program that is added to the engine is added here."""
    shelf.touch()
    bank, names, lanes = shelf.bank, programs.identity_names(shelf.bank), jax.device_put(rows.make_lanes())
    columns = shelf.room.prompts_at_once * shelf.room.prompt_length if shelf.vectors is not None else 0
    gates, enters, one = np.zeros((1, shelf.columns), np.float32), np.full(1, -1, np.int32), np.ones(1, np.int32)
    hidden: Any = None
    begun: list[Any] = []
    widths = {width: np.zeros((1, width), np.int32) for width in (TAIL, CHUNK)}
    for width, tokens in widths.items():
        if columns:
            chosen, strengths = np.zeros(shelf.room.prompts_at_once, np.int32), np.zeros((1, shelf.room.prompts_at_once), np.float32)
            common = (chosen, strengths, tokens, one, gates, enters)
            begun.append(programs.begin_chunk(config, width, params, bank, shelf.vectors, *common)[1])
    stages = []
    for count in cells:
        stage = programs.empty(config, names, (1, count))
        for tokens in widths.values():
            hidden, stage = programs.run_chunk(config, params, bank, stage, tokens, one, gates, enters)
        for size in {CHUNK, CHUNK + columns}:
            if size <= count:
                stage = programs.paste(stage, programs.cut(stage, np.int32(0), size), np.int32(0))
        for start in begun:
            programs.resize(start, count)
        stages.append(stage)
    sampling = sampling_of([None])
    for ways in range(1, rows.most_ways + 1):
        made = programs.first_token(params, [hidden] * ways, np.ones((1, ways), np.float32), sampling, np.zeros(1, bool))
    for n, count in enumerate(cells):
        going = rows.fresh(count)
        for stage in stages[: n + 1]:
            going = programs.insert(going, stage, np.int32(0), made.token)
        going, step = programs.decode(config, params, bank, going, lanes)
        jax.device_get(step)
        for other in cells[max(0, n - 1) : n + 2]:
            if other != count:
                programs.resize(going.cache, other)
