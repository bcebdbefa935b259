"""The four figures beside the table: what a dial does to the reward margin and to the length of answers.

    python experiments/figures.py clm runs/identity_dpo_hh      CLM against lambda, from -1 to 2
    python experiments/figures.py red runs/edit_dpo_hh          RED against strength, from -1 to 2
    python experiments/figures.py meet runs/meet_prompt         MEET from its bad control (0) to its good one (1), mixed between
    python experiments/figures.py rahf runs/a runs/b ...        RAHF against alpha, one run a value
    python experiments/figures.py                               draws all that were measured again

Measures on the held-out rows of the runs' data, keeps the numbers as results/figures/NAME.json and draws figures/NAME.svg. Bands are
95 % bootstraps over rows. Answers are greedy; the margin is that of the log-ratio to the loaded model, chosen less rejected.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from meetjax.adapters.io import load_adapters
from meetjax.adapters.tree import Bank, columns
from meetjax.errors import MeetjaxError
from meetjax.evaluate.intervals import bootstrap_mean
from meetjax.evaluate.preference import row_logps
from meetjax.generate.requests import Request, generate_texts
from meetjax.models.load import Model, load
from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Stage
from meetjax.train.view import Split, read_rows

HERE = Path(__file__).parent
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
AXES = {
    "clm": "lambda",
    "red": "strength",
    "meet": "share of the good control, the rest of the bad one",
    "rahf": "alpha",
}
TITLES = {"clm": "CLM", "red": "RED", "meet": "MEET", "rahf": "RAHF"}
ROWS, MAX_NEW_TOKENS = 60, 128


def measure(name: str, runs: list[Path]) -> dict[str, Any]:
    """{"name", "runs", "data", "points": [{"x", "margin", "tokens"}]}; the two are (mean, low, high), in nats a pair and in tokens."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    loaded = load(summaries[0]["recipe"]["model"])
    fields: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in summaries[0]["recipe"]["data"].items() if key != "type"
    }
    data = Data(**fields)
    split = read_rows(data, Stage(objective=Dpo()), loaded.tokenizer, Console())
    if split.held_out is None:
        raise MeetjaxError(f"{runs[0]}: data.held_out", expected="held-out rows to measure on", found=0)
    base = row_logps(loaded.config, loaded.params, None, split.held_out, split.buckets)
    points = []
    for run, summary in zip(runs, summaries, strict=True):
        model = load(str(run / "model")) if (run / "model").exists() else loaded
        bank = load_adapters(run / "adapters", model.fingerprint)
        if name == "rahf":
            settings = [(summary["recipe"]["stages"][-1]["objective"]["alpha"], (1.0,) * columns(bank))]
        elif name == "meet":
            settings = [(share, (1 - share, share)) for share in SHARES]
        else:
            settings = [(strength, (strength,) * columns(bank)) for strength in STRENGTHS]
        for x, gates in settings:
            points.append({"x": x} | _point(model, bank, gates, split, base))
            print(json.dumps(points[-1]))
    return {"name": name, "runs": [run.name for run in runs], "data": Path(data.path).name, "points": points}


def _point(model: Model, bank: Bank, gates: tuple[float, ...], split: Split, base: np.ndarray) -> dict[str, Any]:
    assert split.held_out is not None
    rows = dataclasses.replace(split.held_out, gates=np.tile(np.asarray(gates, np.float32), (len(split.held_out), 1)))
    moved = row_logps(model.config, model.params, bank, rows, split.buckets) - base
    requests = [Request(record.prompt, gates=gates) for record in split.records[:ROWS]]
    answers = generate_texts(model, requests, adapters=bank, max_new_tokens=MAX_NEW_TOKENS)
    return {
        "margin": bootstrap_mean((moved[:, 0] - moved[:, 1]).tolist(), 0),
        "tokens": bootstrap_mean([answer.tokens for answer in answers], 0),
    }


def draw(found: dict[str, Any]) -> Figure:
    """Margin and length against the dial, side by side."""
    points = sorted(found["points"], key=lambda point: point["x"])
    xs = [point["x"] for point in points]
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = (("margin", "reward margin (nats)"), ("tokens", "answer length (tokens)"))
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        middle, low, high = zip(*(point[key] for point in points), strict=True)
        axes.fill_between(xs, low, high, alpha=0.2, linewidth=0)
        axes.plot(xs, middle, marker="o", markersize=4)
        axes.set(xlabel=AXES[found["name"]], title=title)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{TITLES[found['name']]}, {', '.join(found['runs'])} on {found['data']}"
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10)
    return figure


def main(arguments: list[str]) -> None:
    kept, drawn = HERE / "results" / "figures", HERE / "figures"
    if arguments:
        name, *runs = arguments
        if name not in AXES or not runs:
            raise MeetjaxError("figures", expected=f"one of {', '.join(AXES)}, then run folders", found=" ".join(arguments))
        found = measure(name, [Path(run) for run in runs])
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    drawn.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "meetjax"}):
        for file in sorted(kept.glob("*.json")):
            draw(json.loads(file.read_text())).savefig(drawn / f"{file.stem}.svg", metadata={"Date": None})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MeetjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
