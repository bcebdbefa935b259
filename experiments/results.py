"""The tables of README.md, made from the summaries that runs and `make bench` wrote.

    python experiments/results.py              rewrites the tables from results/*.json and bench/*.json (`make results`)
    python experiments/results.py add runs/X   first keeps the summary of a run as results/X.json

A kept summary is the run's own `summary.json` without what belongs to one machine: its output folder, and the folder of a data file.
A row's command is what its recipe changes of the experiment's file as it stands now.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

from meetjax.experiment import read_recipe
from meetjax.train.stage import resolved

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by results.py -->", "<!-- end of results -->"
HEADER = (
    "| | run | data | seed | steps x prompts | trained parameters | held-out accuracy (95 %, n) | shorter answer | untrained "
    "| KL to the base, nats an answer | mean tokens | device | minutes (of one core) | peak GB (of the device) |"
)
SETS = ("concise", "harmless-base.test.jsonl.gz")
RUNS = (
    "meet_prompt", "meet_lora", "full_sft", "meet_positives", "meet_joint", "meet_markers", "meet_stage1", "meet_hard_tokens", "meet_dpo",
    "identity_dpo_hh", "edit_dpo_hh", "red_plus", "rahf_scit", "rahf_dual", "lora_dpo_hh", "prompt_dpo_hh", "full_dpo",
)  # fmt: skip
"""What is to be measured on each of `SETS`: the table says so where it is not."""
UNSAID = ("name", "out", "train.microbatches")
"""What changes no number, but for the order of sums."""
TOLD = ("data.", "train.", "remat=")
"""Changes that a row shows in columns of their own, or that change no number in it; others stand beside its name."""


def keep(folder: Path) -> Path:
    """Copies a run's summary to results/ and returns the new file."""
    summary = json.loads((folder / "summary.json").read_text())
    recipe = summary["recipe"]
    recipe["out"] = ""
    recipe["data"]["path"] = Path(recipe["data"]["path"]).name if Path(recipe["data"]["path"]).exists() else recipe["data"]["path"]
    file = HERE / "results" / f"{folder.name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(summary, indent=1) + "\n")
    return file


def table(folder: Path = HERE / "results") -> str:
    """One row a kept summary, by data and name, and under the rows their commands; a dash where a run did not measure something."""
    summaries = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(data, name): [] for data in SETS for name in RUNS}
    for summary in summaries:
        found.setdefault((summary["recipe"]["data"]["path"], summary["name"]), []).append(summary)
    rows, commands = [], []
    for (data, name), own in found.items():
        for summary in sorted(own, key=lambda summary: summary["recipe"]["train"]["seed"]):
            commands.append(f"{len(commands) + 1}. `{command(summary)}`")
            rows.append(_row(len(commands), summary))
        if not own:
            rows.append(f"| - | `{name}` | {data} | not run yet |" + " - |" * (HEADER.count("|") - 5))
    head = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    return "\n".join([*head, *rows, "", "<details><summary>Commands</summary>", "", *commands, "", "</details>"])


def _row(number: int, summary: dict[str, Any]) -> str:
    train, data = summary["recipe"]["train"], summary["recipe"]["data"]
    cells = [
        str(number),
        " ".join(
            [f"`{summary['name']}`", *(re.sub(r"^.*\.(?=\w+=)", "", change) for change in changes(summary) if not change.startswith(TOLD))]
        ),
        data["path"],
        str(train["seed"]),
        f"{len(summary['recipe']['stages']) * train['steps']} x {train['batch_size']}",
        f"{summary['trained_parameters']:,}",
        _with_interval(summary, "held_out_accuracy", "held_out_interval", ".3f", f", {summary.get('held_out_n')}"),
        _number(summary, "baseline_shorter_accuracy", ".3f"),
        _number(summary, "baseline_untrained_logps_accuracy", ".3f"),
        _with_interval(summary, "kl", "kl_interval", ".2f"),
        _with_interval(summary, "mean_tokens", "mean_tokens_interval", ".0f"),
        summary.get("device", "cpu"),
        f"{summary['wall_s'] / 60:.0f}" + (f" ({summary['cpu_s'] / 60:.0f})" if "cpu_s" in summary else ""),
        f"{summary['peak_rss_gb']:.1f}" + (f" ({summary['peak_device_gb']:.1f})" if "peak_device_gb" in summary else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def changes(summary: dict[str, Any]) -> list[str]:
    """FIELD=VALUE of what a summary's recipe changes of the experiment's file."""
    own, now = flat(summary["recipe"]), _defaults(HERE / f"{summary['name']}.py")
    return [f"{path}={value}" for path, value in own.items() if path not in UNSAID and now.get(path) != value]


@functools.cache
def _defaults(file: Path) -> dict[str, Any]:
    return flat(resolved(read_recipe(file)))


def command(summary: dict[str, Any]) -> str:
    """The command line that runs a summary's recipe again."""
    return " ".join([f"meetjax align experiments/{summary['name']}.py", *(f"--set {change}" for change in changes(summary))])


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Field path -> value, as `--set` writes it."""
    if isinstance(node, dict):
        return {key: value for name, item in node.items() for key, value in flat(item, f"{path}.{name}" if path else name).items()}
    if isinstance(node, list) and any(isinstance(item, (dict, list)) for item in node):
        return {key: value for i, item in enumerate(node) for key, value in flat(item, f"{path}.{i}").items()}
    return {path: ",".join(map(str, node)) if isinstance(node, list) else node}


def _number(summary: dict[str, Any], name: str, form: str) -> str:
    return format(summary[name], form) if name in summary else "-"


def _with_interval(summary: dict[str, Any], name: str, interval: str, form: str, more: str = "") -> str:
    if name not in summary:
        return "-"
    low, high = summary[interval]
    return f"{summary[name]:{form}} ({low:{form}} to {high:{form}}{more})"


def plain_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows as `make bench` writes them, a column a key; of "ok", what became of the goal."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join("" if key == "ok" else key for key in columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
        if "ok" in row:
            cells["ok"] = "" if row["goal"] == "none" else "met" if row["ok"] else "missed"
        lines.append("| " + " | ".join(cells.get(key, "") for key in columns) + " |")
    return "\n".join(lines)


def rewrite(readme: Path = HERE / "README.md") -> None:
    """Puts every table between its two marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)

    def bench(found: re.Match[str]) -> str:
        begin, file, end = found.groups()
        return f"{begin}\n{plain_table(json.loads((HERE / file).read_text()))}\n{end}"

    text = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    readme.write_text(re.sub(r"(<!-- (bench/\w+\.json): made by results.py -->).*?(<!-- end of it -->)", bench, text, flags=re.DOTALL))


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        for run in sys.argv[2:]:
            print(keep(Path(run)))
    rewrite()
