"""A grid of runs: every combination of named choices, one after the other, each once, and one table and one figure of them all."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from meetjax.align import align
from meetjax.errors import MeetjaxError
from meetjax.train.stage import Recipe, check_recipe, override, resolved

Axes = Mapping[str, Sequence[Any]]
"""Choices by the name of what is chosen, in the order of the table's columns. "seed" is drawn on the line of its combination."""


class Cell(NamedTuple):
    """One run: what was chosen, as text by axis, and its recipe, which writes into a folder of its own."""

    choices: dict[str, str]
    recipe: Recipe


def make_cells(
    axes: Axes, get_config: Callable[..., Recipe | None], out: Path, settings: Sequence[str] = (), only: Sequence[str] = ()
) -> list[Cell]:
    """All combinations for which `get_config(**choices)` gives a recipe, and not None, with `settings` applied to each.

    `only` keeps some choices of some axes, "AXIS=CHOICE" or "AXIS=CHOICE,CHOICE" each.
    Raises MeetjaxError for an unknown axis or choice, or a recipe that cannot run, before any does.
    """
    axes, cells = _chosen(axes, only), []
    for values in itertools.product(*axes.values()):
        choices = dict(zip(axes, values, strict=True))
        recipe = get_config(**choices)
        if recipe is None:
            continue
        named = {axis: str(value) for axis, value in choices.items()}
        recipe = override(recipe, list(settings))
        recipe = dataclasses.replace(recipe, out=str(out / "-".join(named.values())))
        check_recipe(recipe)
        cells.append(Cell(named, recipe))
    if not cells:
        raise MeetjaxError(f"grid {out.name}", expected="at least one combination with a recipe", found="none")
    return cells


def _chosen(axes: Axes, only: Sequence[str]) -> Axes:
    for asked in only:
        axis, _, names = asked.partition("=")
        if axis not in axes:
            raise MeetjaxError(f"only {asked}", expected=f"AXIS=CHOICE with an axis among {', '.join(axes)}", found=repr(axis))
        choices, wanted = {str(value): value for value in axes[axis]}, names.split(",")
        if unknown := [name for name in wanted if name not in choices]:
            raise MeetjaxError(f"only {asked}", expected=f"{axis} among {', '.join(choices)}", found=repr(unknown[0]))
        axes = {**axes, axis: [value for name, value in choices.items() if name in wanted]}
    return axes


def run_grid(cells: Sequence[Cell], out: Path, console: Console | None = None) -> list[dict[str, Any]]:
    """Runs what has not been run, and writes `out/table.md` and `out/figure.svg` after every cell; returns the summaries.

    A finished cell is read and not run again; an interrupted one goes on. A cell that cannot run is told in the table, tried again
    next time, and does not stop the others. Raises MeetjaxError for a folder that holds a run of another recipe.
    """
    console, results = console or Console(), [_finished(cell) for cell in cells]
    for i, cell in enumerate(cells):
        if results[i] is None:
            done = sum(result is not None for result in results)
            console.rule(f"{done} of {len(cells)} done; next: {', '.join(f'{axis} {name}' for axis, name in cell.choices.items())}")
            try:
                results[i] = align(cell.recipe, console=console)
            except MeetjaxError as error:
                console.print(f"[red]not run:[/] {error}", highlight=False)
                results[i] = {"error": str(error)}
            jax.clear_caches()  # programs of cells that differ in shape are not needed again
        _write(cells, results, out)
    console.print(f"wrote {out / 'table.md'} and {out / 'figure.svg'}")
    return [result or {} for result in results]


def _finished(cell: Cell) -> dict[str, Any] | None:
    file = Path(cell.recipe.out) / "summary.json"
    if not file.exists():
        return None
    fix = "delete the folder, or give the grid another one with --out FOLDER"
    try:
        summary = json.loads(file.read_text())
        recipe = summary["recipe"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise MeetjaxError(f"{file}: not the summary of a run", found=error, fix=fix) from None
    if recipe != json.loads(json.dumps(resolved(cell.recipe))):
        raise MeetjaxError(f"{file}: recipe", expected="the recipe of this cell", found="another one", fix=fix)
    return summary


def table(cells: Sequence[Cell], results: Sequence[dict[str, Any] | None]) -> str:
    """Markdown, a row a cell: choices, trained parameters, held-out accuracy with its interval, drift, minutes; or why it did not run."""
    axes = list(cells[0].choices)
    measured = ["trained parameters", "held-out accuracy (95 %)", "KL, nats an answer", "mean tokens", "minutes"]
    lines = ["| " + " | ".join(axes + measured) + " |", "|" + " --- |" * (len(axes) + len(measured))]
    for cell, result in zip(cells, results, strict=True):
        lines.append("| " + " | ".join([*cell.choices.values(), *_shown(result)]) + " |")
    return "\n".join(lines) + "\n"


def _shown(result: dict[str, Any] | None) -> list[str]:
    if result is None or "error" in result:
        return [("not run yet" if result is None else result["error"].replace("|", "/")), *["-"] * 4]
    low, high = result.get("held_out_interval", (0, 0))
    accuracy = f"{result['held_out_accuracy']:.3f} ({low:.3f} to {high:.3f})" if "held_out_accuracy" in result else "-"
    drift = [f"{result[name]:.{digits}f}" if name in result else "-" for name, digits in (("kl", 2), ("mean_tokens", 0))]
    return [f"{result['trained_parameters']:,}", accuracy, *drift, f"{result['wall_s'] / 60:.0f}"]


def draw(cells: Sequence[Cell], results: Sequence[dict[str, Any] | None]) -> Figure:
    """Held-out accuracy with its 95 % interval, a line a combination, its seeds on one line, coloured by the first axis."""
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, result in zip(cells, results, strict=True):
        name = ", ".join(value for axis, value in cell.choices.items() if axis != "seed")
        groups.setdefault(name, [])
        if result and "held_out_accuracy" in result:
            groups[name].append((cell, result))
    first = list(dict.fromkeys(next(iter(cell.choices.values())) for cell in cells))
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        for place, own in enumerate(groups.values()):
            for k, (cell, result) in enumerate(own):
                low, high = result["held_out_interval"]
                height = place + (k - (len(own) - 1) / 2) * 0.6 / max(len(own), 1)
                colour = f"C{first.index(next(iter(cell.choices.values())))}"
                axes.plot([low, high], [height, height], color=colour, linewidth=1.4)
                axes.plot(result["held_out_accuracy"], height, "o", color=colour, markersize=4.5)
        axes.axvline(0.5, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("held-out accuracy, 95 % interval")
    return figure


def _write(cells: Sequence[Cell], results: Sequence[dict[str, Any] | None], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(cells, results))
    draw(cells, results).savefig(out / "figure.svg", metadata={"Date": None})
