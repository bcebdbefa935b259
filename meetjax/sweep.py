"""A prompt under every strength of an adapter, in one batch: how long the answers are and how far they lie from the base."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meetjax.adapters.algebra import at_strength
from meetjax.adapters.tree import Bank, columns
from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.tokenize import make_rows
from meetjax.errors import MeetjaxError
from meetjax.evaluate.curves import answer_positions, compare, forward
from meetjax.generate.requests import Completion, Request, generate_texts
from meetjax.models.load import Model

MOST = 128
"""Rows of the one batch."""
BAR = 12


@dataclasses.dataclass(frozen=True)
class Point:
    """One answer. kl: KL(dialled || base) over the vocabulary; log_ratio: log dialled / base of its own tokens; nats a token, means."""

    strength: float
    prompt: str
    answer: Completion
    kl: float
    log_ratio: float


def parse_strengths(text: str) -> tuple[float, ...]:
    """Strengths from `first:last:step`, both ends included, or from a list with commas. Raises MeetjaxError for anything else."""
    parts = text.split(":")
    try:
        numbers = [float(part) for part in (parts if len(parts) > 1 else text.split(","))]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError
        if len(parts) == 1:
            return tuple(dict.fromkeys(numbers))
        first, last, step = numbers
        count = math.floor((last - first) / step + 1e-9) + 1
        if step <= 0 or not 1 <= count <= MOST:
            raise ValueError
        return tuple(round(first + i * step, 9) for i in range(count))
    except (ValueError, ZeroDivisionError):
        expected = f"first:last:step with at most {MOST} strengths, or numbers with commas between"
        raise MeetjaxError("--strengths", expected=expected, found=text, fix="for example --strengths -1:2:0.25") from None


def sweep_prompts(model: Model, bank: Bank, prompts: Sequence[str], strengths: Sequence[float], max_new_tokens: int) -> list[Point]:
    """A greedy answer to each prompt at each strength, prompt by prompt. In the weights, or in the logits for soft prompts.

    Raises MeetjaxError for more rows than one batch holds, and as `generate_texts` does.
    """
    if len(prompts) * len(strengths) > MOST:
        raise MeetjaxError("sweep: prompts x strengths", expected=f"at most {MOST}", found=len(prompts) * len(strengths))
    if columns(bank) > 1:
        fix = "export one of them as an adapter of its own, or set each with generate --strength"
        raise MeetjaxError("sweep: gate columns of the adapter", expected="one, for one strength to set", found=columns(bank), fix=fix)
    asked = [(prompt, strength, *at_strength(bank, strength)) for prompt in prompts for strength in strengths]
    requests = [Request(prompt, gates=gates, dial=dial) for prompt, _, gates, dial in asked]
    answers = generate_texts(model, requests, adapters=bank, max_new_tokens=max_new_tokens, batch_size=len(requests))
    gates = np.asarray([row for _, _, row, _ in asked], np.float32)
    dials = np.asarray([1.0 if dial is None else dial for *_, dial in asked], np.float32)
    kl, ratio = distances(model, bank, answers, gates, dials)
    return [Point(s, prompt, answer, *own) for (prompt, s, *_), answer, *own in zip(asked, answers, kl, ratio, strict=True)]


def distances(
    model: Model, bank: Bank, answers: Sequence[Completion], gates: Float[np.ndarray, "N A"], dials: Float[np.ndarray, " N"]
) -> tuple[list[float], list[float]]:
    """(KL(dialled || base), log dialled / base) of each answer under its own gates and logit dial, nats a token."""
    rows = make_rows([(i, [np.array([*answer.prompt, *answer.ids], np.int32)], [len(answer.prompt)]) for i, answer in enumerate(answers)])
    rows = dataclasses.replace(rows, gates=gates)
    totals = np.zeros((2, len(rows)))
    for batch, chosen in eval_batches(rows, 4, choose_buckets(rows, count=3)):
        answer, targets, positions = answer_positions(batch)
        base = positions(forward(model.config, model.params, None, batch))
        adapted = positions(forward(model.config, model.params, bank, batch))
        # Logits are linear in the normed hidden state, so mixing these mixes those.
        share = np.ones((len(base), 1), np.float32)
        share[: len(answer), 0] = dials[chosen[answer]]
        ratio, kl = compare(model.params, model.params, share * adapted + (1 - share) * base, base, targets)
        for total, each in zip(totals, (kl, ratio), strict=True):
            np.add.at(total, chosen[answer], np.asarray(each)[: len(answer)])
    tokens = [answer.tokens for answer in answers]
    return tuple((total / tokens).tolist() for total in totals)


def show(points: Sequence[Point], console: Console) -> None:
    """A table a prompt: strength, length as a number and as a bar, distance from the base, and the answer."""
    longest = max(point.answer.tokens for point in points)
    for prompt, own in groupby(points, key=lambda point: point.prompt):
        table = Table("strength", "tokens", "", "KL", "log-ratio", "answer", title=Text(prompt), title_justify="left", show_lines=True)
        for point in own:
            bar = "█" * max(1, round(BAR * point.answer.tokens / longest))
            numbers = (f"{point.strength:g}", str(point.answer.tokens), bar, f"{point.kl:.3f}", f"{point.log_ratio:.3f}")
            table.add_row(*numbers, Text(point.answer.text.strip()))
        console.print(table)


def write(points: Sequence[Point], out: Path) -> Path:
    """`sweep.csv`, a line an answer, and `sweep.svg`; returns the folder. Raises MeetjaxError when it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "sweep.csv", "w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(("strength", "prompt", "tokens", "ended", "kl", "log_ratio", "answer"))
            for p in points:
                lines.writerow((p.strength, p.prompt, p.answer.tokens, int(p.answer.ended), p.kl, p.log_ratio, p.answer.text))
        draw(points).savefig(out / "sweep.svg", metadata={"Date": None})
    except OSError as error:
        raise MeetjaxError(f"{out}: could not be written", found=error, fix="choose another --out") from error
    return out


def draw(points: Sequence[Point]) -> Figure:
    """Answer length, and distance from the base, against strength: means over the prompts."""
    strengths = sorted({point.strength for point in points})
    mean = {
        name: [np.mean([read(point) for point in points if point.strength == strength]) for strength in strengths]
        for name, read in (
            ("tokens", lambda p: p.answer.tokens),
            ("KL to the base", lambda p: p.kl),
            ("log-ratio to the base", lambda p: p.log_ratio),
        )
    }
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(strengths, mean["tokens"], marker="o", markersize=4)
        left.set_title("answer length, tokens", loc="left", fontsize=9)
        left.set_ylim(bottom=0)
        for name, marker in (("KL to the base", "o"), ("log-ratio to the base", "s")):
            right.plot(strengths, mean[name], marker=marker, markersize=4, label=name)
        right.set_title("nats a token", loc="left", fontsize=9)
        right.legend(frameon=False)
        for axes in (left, right):
            axes.axvspan(0, 1, color="0.93", linewidth=0, zorder=0)
            axes.set_xlabel("strength (0 base, 1 trained)")
    return figure
