"""The table of measured runs says what the kept summaries say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from meetjax.train.stage import override, resolved
from tests.test_stages import load_experiment

FILE = Path(__file__).parent.parent / "experiments" / "results.py"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_holds_the_tables_of_what_is_kept(results, tmp_path):
    readme, again = (FILE.parent / "README.md").read_text(), tmp_path / "README.md"
    again.write_text(re.sub(r"^\|.*\n", "", readme, flags=re.MULTILINE))
    results.rewrite(again)
    files = re.findall(r"<!-- (bench/\w+\.json)", readme)
    kept = [results.table(), *(results.plain_table(json.loads((FILE.parent / file).read_text())) for file in files)]
    assert files and all(table in readme and table in again.read_text() for table in kept), "run make results"


def test_kept_summaries_name_no_folder_of_a_machine():
    for file in (FILE.parent / "results").glob("*.json"):
        recipe = json.loads(file.read_text())["recipe"]
        assert recipe["out"] == "" and "/" not in recipe["data"]["path"].removeprefix("Anthropic/"), file


def test_a_run_is_kept_and_shown(results, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")
    summary = {
        "name": "edit_dpo_hh", "trained_parameters": 34560, "held_out_accuracy": 0.6282828, "held_out_interval": [0.5849, 0.6697],
        "held_out_n": 495, "baseline_shorter_accuracy": 0.5394, "wall_s": 1680.0, "cpu_s": 900.0, "peak_rss_gb": 6.438, "device": "A1",
        "peak_device_gb": 2.512,
        "recipe": {"data": {"path": str(data)}, "train": {"seed": 3, "steps": 200, "batch_size": 4}, "stages": [{}, {}], "out": "there"},
    }  # fmt: skip
    (tmp_path / "edit_dpo_hh.py").write_text((FILE.parent / "edit_dpo_hh.py").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(results, "HERE", tmp_path)
    assert results.keep(tmp_path / "run") == tmp_path / "results" / "run.json"
    lines = results.table(tmp_path / "results").splitlines()
    row = "| 1 | `edit_dpo_hh` | pairs.jsonl | 3 | 400 x 4 | 34,560 | 0.628 (0.585 to 0.670, 495) | 0.539 | - | - | - | A1 | 28 (15) | "
    row += "6.4 (2.5) |"
    assert row in lines and "1. `meetjax align experiments/edit_dpo_hh.py --set data.path=pairs.jsonl --set train.seed=3`" in lines
    assert sum("not run yet" in line for line in lines) == len(results.RUNS) * len(results.SETS)
    assert {line.count("|") for line in lines if line.startswith("|")} == {results.HEADER.count("|")}


def test_the_command_of_a_row_gives_its_recipe(results):
    files = sorted((FILE.parent / "results").glob("*.json"))
    assert files
    for file in files:
        summary = json.loads(file.read_text())
        words = results.command(summary).split()
        module = load_experiment(Path(words[2]).stem)
        made = json.loads(json.dumps(resolved(override(module.get_config(), words[4::2]))))
        kept = {field: value for field, value in results.flat(summary["recipe"]).items() if field not in results.UNSAID}
        assert kept.items() <= results.flat(made).items(), file
