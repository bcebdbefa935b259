"""What a mixture of adapters costs a decoding step of the engine: `python experiments/bench/overhead.py [--rounds 10]`.

Eight rows of SmolLM2-135M-Instruct, each under an adapter and a strength of its own, beside the same rows without room for any
adapter, and beside rows that all share one adapter. Steps of the sides alternate; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.models.decoder import unstack
from meetjax.models.load import load
from meetjax.serve.prefix import PrefixCache
from meetjax.serve.room import Room, Shelf, room_for
from meetjax.serve.rows import Prefill, Request, Rows, cell_counts
from meetjax.serve.stream import Ask, Stream
from meetjax.serve.text import Writer

SLOTS, PROMPT, STEPS = 8, 24, 6
NONE = Room(0, 0, 0, 0, 0, (), 0, ())
SPECS = {"prompt": PromptSpec(length=20), "edit": EditSpec(), "lora": LoraSpec(rank=16, sites=("q", "v"))}
GOALS = {"prompt": 1.05, "edit": 1.05, "lora": 1.15}


def running(model: Any, params: Any, room: Room, banks: list[Any], mixtures: list[dict[str, float]]) -> Rows:
    """A batch whose rows decode under these mixtures of the banks "0", "1", ..."""
    shelf = Shelf(model.config, room)
    for n, bank in enumerate(banks):
        shelf.put(str(n), Path(), bank)
    cells = cell_counts(room.prompts_at_once * room.prompt_length, 64)
    rows = Rows(model.config, params, shelf, len(mixtures), cells)
    draw = np.random.default_rng(0)
    for mixture in mixtures:
        ask = Ask(tuple(draw.integers(10, 1000, PROMPT).tolist()), mixture)
        ways = shelf.ways([(shelf.adapters[name], strength) for name, strength in mixture.items()], None)
        request = Request(Stream(ask), ways, [], Writer(model.tokenizer, ()), 0.0)
        prefill = Prefill(model.config, params, shelf, PrefixCache(0), cells, request)
        while not prefill.finished:
            prefill.run()
        rows.join(request, prefill)
    jax.block_until_ready(rows.step())
    return rows


def seconds(rows: Rows, steps: int = STEPS) -> float:
    """Median of some steps, each waited for; the rows then go back, so that they never need more cells."""
    found = []
    filled = [dict(request.rows) for request in rows.requests]
    cells = jax.device_get(rows.going.cache.cells)
    for _ in range(steps):
        begun = time.perf_counter()
        jax.block_until_ready(rows.step())
        found.append(time.perf_counter() - begun)
    for request, own in zip(rows.requests, filled, strict=True):
        request.rows = own
    rows.going = rows.going._replace(cache=dataclasses.replace(rows.going.cache, cells=jax.device_put(cells)))
    return median(found)


def overheads(model: Any, rounds: int = 10) -> list[dict[str, Any]]:
    """Rows {"name", "goal", "measured", "ok", "detail"}: mixed adapters over none, and over one that all share."""
    params = unstack(model.params)
    table = []
    nothing: list[dict[str, float]] = [{} for _ in range(SLOTS)]
    none = running(model, params, NONE, [], nothing)
    for kind, spec in SPECS.items():
        banks = [init_bank(model.config, model.params, (spec,), model.tokenizer, jax.random.key(n)) for n in range(SLOTS)]
        room, single = room_for(banks, 0), room_for(banks[:1], 0)
        strengths = np.linspace(0.25, 2.0, SLOTS).tolist()
        sides = {
            "none": none,
            "mixed": running(model, params, room, banks, [{str(n): strength} for n, strength in enumerate(strengths)]),
            "shared": running(model, params, room, banks, [{"0": 1.0} for _ in range(SLOTS)]),
            "alone": running(model, params, single, banks[:1], [{"0": 1.0} for _ in range(SLOTS)]),
            "strengths": running(model, params, single, banks[:1], [{"0": strength} for strength in strengths]),
        }
        spent: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name in list(sides) if turn % 2 else list(sides)[::-1]:
                spent[name].append(seconds(sides[name]))
        for name, above, below, goal in (
            (f"8 {kind} adapters in 8 rows over none", "mixed", "none", GOALS[kind]),
            (f"8 {kind} adapters in 8 rows over one in all, same bank", "mixed", "shared", 1.05),
            (f"8 strengths of one {kind} over one strength", "strengths", "alone", 1.05),
        ):
            measured = median(a / b for a, b in zip(spent[above], spent[below], strict=True))
            detail = f"{1e3 * median(spent[above]):.1f} against {1e3 * median(spent[below]):.1f} ms a step"
            table.append({"name": name, "goal": f"<= {goal}x", "measured": round(measured, 4), "ok": measured <= goal, "detail": detail})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    asked = parser.parse_args()
    table = overheads(load("smollm2-135m-instruct"), asked.rounds)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        met = "met" if row["ok"] else "MISSED"
        Console().print(f"{row['name']}: {row['measured']:.3f} (goal {row['goal']}) {met} {row['detail']}")


if __name__ == "__main__":
    main()
