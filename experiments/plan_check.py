"""What pods must hold, asked of the TPU compiler on this machine: writes runs/plan/summary.json and the table in BUILD.md.

    make plan-check

On two CPU cores alone about five minutes. Exit status 1 when a goal is missed. A batch of 256 is 256 pairs whose answers each have a copy
of the prompt, so 512 rows: more than the 256 rows of shared prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from meetjax.models.published import find_config
from meetjax.plan.compiler import ask
from meetjax.plan.question import RECIPES, Answer, Question
from meetjax.plan.settings import first_setting
from meetjax.plan.table import GIB, say_setting, verdict

ROOT = Path(__file__).parent.parent
MARKERS = "<!-- plan-check -->", "<!-- /plan-check -->"
ROOM = 2.0
"""GiB of temporaries a chip."""
RATIO = 0.55
"""Bytes of an int8 base over those of bfloat16, embedding and head included."""


@functools.cache
def _ask(model: str, recipe: str, topology: str, batch: int, what: Any = "train", **chosen: Any) -> tuple[Question, Answer]:
    question = Question(model, find_config(model), recipe, RECIPES[recipe], topology, batch, 2048, what)
    setting = first_setting(question)
    return question, ask(question, dataclasses.replace(setting, **chosen))


def _seven(recipe: str, **chosen: Any) -> tuple[Question, Answer]:
    return _ask("llama-2-7b", recipe, "v5e:16x16", 256, **chosen)


def rows(only: str) -> list[dict[str, Any]]:
    """Every check whose name contains `only`."""
    made: list[dict[str, Any]] = []

    def add(name: str, goal: str, measured: Any, ok: bool, of: Answer) -> None:
        told = f"{verdict(of)}, {say_setting(of.setting)}, compiled in {of.compile_s:.0f} s"
        made.append({"name": name, "goal": goal, "measured": measured, "ok": ok, "told": told})
        print(json.dumps(made[-1]), flush=True)

    def temporaries(found: Answer) -> str:
        return f"{found.temporaries / GIB:.2f} GiB" if found.fits else verdict(found)

    for recipe in ("lora-dpo", "red-dpo", "clm-dpo", "prompt-dpo"):
        if only not in (name := f"llama-2-7b {recipe}, 256 pairs x 2048 on v5e:16x16"):
            continue
        question, found = _seven(recipe)
        ok = found.fits and found.temporaries <= ROOM * GIB
        add(name, f"fits, temporaries <= {ROOM} GiB a chip", temporaries(found), ok, found)
        if recipe == "lora-dpo":
            whole = question.rows // found.setting.microbatches * question.length * question.config.width
            goal = f"no gathered array of a micro-batch's {whole:.2e} activations"
            add(f"{name}: largest all-gather", goal, f"{found.largest:.2e} numbers", 0 < found.largest < whole, found)
    for residual, goal in (("sequence", "fits"), ("free", "does not fit")):
        if only in (name := f"llama-2-7b lora-dpo in one go, xla attention, residual {residual}"):
            # xla's: the kernel's own split of rows and heads would hold the stream in every layer.
            found = _seven("lora-dpo", residual=residual, attention="xla", microbatches=1)[1]
            add(name, goal, verdict(found), found.fits == (goal == "fits"), found)
    if only in (name := "llama-2-7b lora-dpo, int8 base: its bytes over those of bfloat16"):
        found = _seven("lora-dpo", base="int8")[1]
        ratio = found.base / _seven("lora-dpo")[1].base
        add(name, f"<= {RATIO}", f"{ratio:.3f}", found.fits and ratio <= RATIO, found)
    if only in (name := "llama-2-70b lora-dpo, 128 pairs x 2048 on v5p:4x4x4"):
        found = _ask("llama-2-70b", "lora-dpo", "v5p:4x4x4", 128)[1]
        add(name, "fits", verdict(found), found.fits, found)
    if only in (name := "llama-3-8b decode with lora and the logit dial, 32 x 2048 on v5e:2x2"):
        found = _ask("llama-3-8b", "lora-dpo", "v5e:2x2", 32, "decode")[1]
        add(name, "fits", verdict(found), found.fits, found)
    return made


def write_table(made: list[dict[str, Any]], file: Path) -> None:
    """Puts the table between its markers."""
    begin, end = MARKERS
    text = file.read_text()
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    lines = ["| step | goal | found | |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['name']} | {row['goal']} | {row['measured']} | {'yes' if row['ok'] else 'NO'} |" for row in made]
    file.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + after)


def keep(made: list[dict[str, Any]], only: str) -> list[dict[str, Any]]:
    """Writes runs/plan/summary.json and the table: all rows made, or, where `only` some were, the others as an earlier run left them."""
    out = ROOT / "runs" / "plan" / "summary.json"
    before = json.loads(out.read_text()) if only and out.exists() else []
    new = {row["name"]: row for row in made}
    whole = [new.pop(row["name"], row) for row in before] + list(new.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=2) + "\n")
    write_table(whole, ROOT / "BUILD.md")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="checks whose name contains this; the others stay as they were")
    only = parser.parse_args().only
    made = rows(only)
    sys.exit(0 if made and all(row["ok"] for row in keep(made, only)) else 1)


if __name__ == "__main__":
    main()
