"""A plan in words: what the terminal shows and what `--json` writes."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group
from rich.table import Table

from meetjax.plan.chips import CHIPS, Chip
from meetjax.plan.question import Answer, Question, Setting

GIB = 2**30


def chip_of(question: Question) -> Chip:
    return CHIPS[question.topology.split(":")[0]]


def say_setting(setting: Setting) -> str:
    """One line."""
    mesh = " x ".join(map(str, setting.mesh))
    parts = "" if setting.microbatches == 1 else f", {setting.microbatches} microbatches"
    how = f"remat {setting.remat}, attention {setting.attention}, residual {setting.residual}, base {setting.base}"
    return f"mesh (data, fsdp, model) {mesh}, {how}{parts}"


def verdict(answer: Answer) -> str:
    """Fits, or by how much not."""
    if answer.fits:
        return f"fits: {(answer.arguments + answer.temporaries) / GIB:.2f} GiB a device"
    return f"does not fit: {answer.over / GIB:.2f} GiB a device too many"


def as_json(question: Question, answer: Answer, suggestion: tuple[str, Answer] | None) -> dict[str, Any]:
    """Everything as plain data."""
    asked = {
        name: getattr(question, name)
        for name in ("model", "recipe", "what", "topology", "slices", "batch", "length", "shared_prompt", "dial")
    }
    told = {"asked": asked | {"rows": question.rows}, "chip": dataclasses.asdict(chip_of(question)), "answer": dataclasses.asdict(answer)}
    return told | {"suggestion": None if suggestion is None else {"change": suggestion[0]} | dataclasses.asdict(suggestion[1])}


def as_table(question: Question, answer: Answer, suggestion: tuple[str, Answer] | None) -> Group:
    """The same for a terminal."""
    chip, table = chip_of(question), Table(show_header=False, box=None, pad_edge=False)
    half = "answers in copies of the prompt" if question.rows != question.batch else "one row each"
    table.add_row(
        "asked",
        f"{question.model}, {question.recipe}, {question.what}: batch {question.batch} ({half}) x {question.length} on {question.topology}",
    )
    table.add_row("setting", say_setting(answer.setting))
    table.add_row("verdict", verdict(answer))
    table.add_row("memory", ", ".join(f"{name} {getattr(answer, name) / GIB:.3f} GiB" for name in ("arguments", "temporaries", "output")))
    table.add_row("arguments", ", ".join(f"{name} {size / GIB:.3f}" for name, size in answer.groups.items()) + " GiB a device")
    if answer.fits:
        table.add_row("products", f"{answer.flops:.3e} FLOP a step, counted by hand")
        table.add_row("sent", ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in answer.moved.items()) + " a device and step")
        table.add_row(
            "at least", ", ".join(f"{name} {seconds:.3f} s" for name, seconds in answer.seconds.items()) + f"; bound by {answer.bound}"
        )
        speeds = f"memory {chip.memory_bandwidth / 1e9:.0f} GB/s, links {chip.link_bandwidth / 1e9:.0f} GB/s"
        table.add_row("of", f"{chip.peak_flops / 1e12:.0f} TFLOP/s, {speeds} a chip, as published")
    if suggestion is not None:
        name, better = suggestion
        table.add_row("better", f"{name}: {verdict(better)}, at least {better.seconds[better.bound]:.3f} s, bound by {better.bound}")
    table.add_row("compiled", f"in {answer.compile_s:.0f} s; nothing was run")
    return Group(table)
