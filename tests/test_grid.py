"""A grid of runs: every cell once, what is finished is never run again, and what cannot run is told."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

import meetjax.grid as grid_module
from meetjax.errors import MeetjaxError
from meetjax.grid import draw, make_cells, run_grid, table
from meetjax.train.stage import Data, Recipe, Train, resolved

AXES = {"objective": ("sft", "dpo"), "rank": (4, 8), "seed": (0, 1)}


def get_config(objective, rank, seed):
    if objective == "sft" and rank == 8:
        return None
    return Recipe(name=f"{objective}-{rank}", data=Data(path="concise"), train=Train(steps=rank, seed=seed))


@pytest.fixture
def runs(monkeypatch):
    """Recipes that reach `align`, which here only writes the summary; "fails" names those that do not get that far."""
    seen, fails = [], set()

    def align(recipe, console):
        seen.append(recipe)
        if recipe.name in fails:
            raise MeetjaxError("data: missing | gone")
        rate = 0.5 + 0.01 * recipe.train.steps
        summary = {
            "recipe": resolved(recipe), "trained_parameters": 10, "held_out_accuracy": rate, "held_out_interval": [rate - 0.1, rate + 0.1],
            "wall_s": 60.0,
        }  # fmt: skip
        folder = grid_module.Path(recipe.out)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr(grid_module, "align", align)
    return seen, fails


def quiet():
    return Console(file=io.StringIO())


def test_finished_cells_are_never_run_again(runs, tmp_path):
    seen, fails = runs
    cells = make_cells(AXES, get_config, tmp_path, ["train.batch_size=4"])
    assert [list(cell.choices.values()) for cell in cells][:3] == [["sft", "4", "0"], ["sft", "4", "1"], ["dpo", "4", "0"]]
    assert len(cells) == 6 and all(cell.recipe.train.batch_size == 4 for cell in cells)
    fails.add("dpo-8")
    first = run_grid(cells, tmp_path, quiet())
    assert len(seen) == 6 and [bool(result.get("error")) for result in first] == [False] * 4 + [True] * 2
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[2] == "| sft | 4 | 0 | 10 | 0.540 (0.440 to 0.640) | - | - | 1 |"
    assert rows[-1] == "| dpo | 8 | 1 | data: missing / gone | - | - | - | - |"
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    fails.clear()
    second = run_grid(cells, tmp_path, quiet())
    assert [recipe.name for recipe in seen[6:]] == ["dpo-8", "dpo-8"] and not any("error" in result for result in second)
    run_grid(cells, tmp_path, quiet())
    assert len(seen) == 8


def test_seeds_share_a_line_of_the_figure(runs, tmp_path):
    cells = make_cells(AXES, get_config, tmp_path)
    results = run_grid(cells, tmp_path, quiet())
    (axes,) = draw(cells, results).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sft, 4", "dpo, 4", "dpo, 8"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert sorted(round(float(line.get_ydata()[0])) for line in dots) == [0, 0, 1, 1, 2, 2]
    assert "not run yet" in table(cells, [None] * 6)


def test_a_folder_of_another_recipe_is_refused(runs, tmp_path):
    run_grid(make_cells(AXES, get_config, tmp_path), tmp_path, quiet())
    with pytest.raises(MeetjaxError, match="recipe; expected the recipe of this cell; found another one; delete the folder"):
        run_grid(make_cells(AXES, get_config, tmp_path, ["data.seed=1"]), tmp_path, quiet())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_broken_summary_is_refused(runs, tmp_path, text):
    cells = make_cells(AXES, get_config, tmp_path)
    file = grid_module.Path(cells[0].recipe.out) / "summary.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(MeetjaxError, match=r"summary\.json: not the summary of a run; found .*; delete the folder"):
        run_grid(cells, tmp_path, quiet())


def test_cells_are_checked_before_any_runs(runs, tmp_path):
    with pytest.raises(MeetjaxError, match=r"train\.steps"):
        make_cells(AXES, get_config, tmp_path, ["train.steps=0"])
    with pytest.raises(MeetjaxError, match="expected at least one combination with a recipe"):
        make_cells({"objective": ("sft",), "rank": (8,), "seed": (0,)}, get_config, tmp_path)
    assert not runs[0]


def test_some_choices_of_some_axes(tmp_path):
    cells = make_cells(AXES, get_config, tmp_path, only=["objective=dpo", "seed=1"])
    assert [tuple(cell.choices.values()) for cell in cells] == [("dpo", "4", "1"), ("dpo", "8", "1")]
    assert make_cells(AXES, get_config, tmp_path, only=["rank=8,4"]) == make_cells(AXES, get_config, tmp_path)
    for wrong in ("kind=edit", "rank=16", "rank", "rank=4,"):
        with pytest.raises(MeetjaxError, match=f"only {wrong}; expected"):
            make_cells(AXES, get_config, tmp_path, only=[wrong])


def test_the_study_is_a_grid(tmp_path):
    """Both objectives on the same adapters at the same rate, no edit with a rank, and QLoRA at one."""
    from tests.test_stages import load_experiment

    module = load_experiment("tradeoffs")
    cells = make_cells(module.AXES, module.get_config, tmp_path)
    assert len(cells) == 2 * 2 * (3 + 1 + 1) * 2 and len({cell.recipe.out for cell in cells}) == len(cells)
    pairs = {}
    for cell in cells:
        key = tuple(value for axis, value in cell.choices.items() if axis != "objective")
        pairs.setdefault(key, []).append(dataclasses.replace(cell.recipe.stages[0], objective=None))
    assert all(len(stages) == 2 and stages[0] == stages[1] for stages in pairs.values())
