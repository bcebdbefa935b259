"""One run told on one page: `write_report` makes `report.html` of what `summary.write_summary` stores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from meetjax.errors import MeetjaxError
from meetjax.evaluate import plots
from meetjax.evaluate.style import CSS
from meetjax.evaluate.summary import write_whole

FIELDS = (
    "model",
    "trained_parameters",
    "wall_s",
    "peak_rss_gb",
    "command",
    "versions",
    "times",
    "untrained",
    "baseline_shorter_accuracy",
    "kinds",
)
KIND_FIELDS = ("held_out_accuracy", "interval", "n", "train_s", "steps", "final_loss", "curve", "losses")
PLOTS = (  # field of a curve point, axis title with unit, caption
    ("mean_tokens", "mean answer length (tokens)", "How long the greedy answers to held-out prompts are."),
    (
        "reward_margin",
        "implicit reward margin (nats)",
        "How much further the dial moves the chosen answer than the rejected one, against the base model. Above 0 it prefers the chosen.",
    ),
    ("kl", "KL to the base (nats per token)", "How far the dialled model's next-token distribution has moved away from the base model's."),
)
WHAT_A_STRENGTH_IS = """
A <strong>strength</strong> is how much of a trained adapter the model uses. <strong>0</strong> is the base model, bit for bit.
<strong>1</strong> is the adapter as it was trained. Between the two the dial interpolates; beyond 1 it extrapolates, which exaggerates
what was learnt and far enough out breaks the answers; below 0 it goes the other way. The strength is an input of the model, not part of its
weights: each request chooses its own, and no training or compiling is repeated.
"""


def write_report(summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: str | Path) -> Path:
    """Writes `folder/report.html`, one file that refers to nothing outside itself, and returns its path.

    summary: the mapping that `write_summary` stores, with `FIELDS`, and `KIND_FIELDS` for each kind. Accuracies are fractions, times
    seconds, `peak_rss_gb` 1e9 bytes, `losses` nats a step. samples: {"prompt", "kind", "answers": {strength: text}}, each prompt
    in order of first appearance. Raises MeetjaxError for a missing field or when the file cannot be written.
    """
    _check(summary)
    for number, sample in enumerate(samples):
        for field in ("prompt", "kind", "answers"):
            if field not in sample:
                raise MeetjaxError(f"report: samples[{number}]", expected=f"a field {field}", found=", ".join(sample) or "none")
    body = [
        _head(summary),
        _plots(summary),
        _accuracy(summary),
        _losses(summary),
        _samples(samples, list(summary["kinds"])),
        _costs(summary),
    ]
    title = f"meetjax: {escape(summary['model'])}"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{chr(10).join(part for part in body if part)}
</main>
</body>
</html>
"""
    return write_whole(Path(folder) / "report.html", page)


def _check(summary: Mapping[str, Any]) -> None:
    missing = [field for field in FIELDS if field not in summary]
    for kind, entry in summary.get("kinds", {}).items():
        missing += [f"kinds.{kind}.{field}" for field in KIND_FIELDS if field not in entry]
        for i, point in enumerate(entry.get("curve", ())):
            missing += [f"kinds.{kind}.curve[{i}].{field}" for field in ("strength", *(p[0] for p in PLOTS)) if field not in point]
        if kind not in summary.get("trained_parameters", {}):
            missing.append(f"trained_parameters.{kind}")
    if missing:
        raise MeetjaxError(
            f"report: summary field {missing[0]}", expected="a value", found="none", fix="write the summary with this version"
        )


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60:,} min {whole % 60:02d} s"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _float(value: Any) -> float:
    """A number to draw; null in a summary read back from JSON is not a number."""
    return math.nan if value is None else float(value)


def _interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f} %"


def _head(summary: Mapping[str, Any]) -> str:
    kinds = summary["kinds"]
    counts = [summary["trained_parameters"][kind] for kind in kinds] or [0]
    facts = [
        ("adapters trained", f"{len(kinds)}"),
        ("trained parameters", " – ".join(dict.fromkeys((_short(min(counts)), _short(max(counts)))))),
        ("wall time", _seconds(summary["wall_s"])),
        ("peak memory", f"{summary['peak_rss_gb']:.1f} GB"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f"""<h1>A dial on {escape(summary["model"])}</h1>
<p class="muted">Small adapters ({escape(", ".join(kinds))}) trained on a frozen base model with meetjax, and what turning them up does.</p>
<dl class="facts">{cells}</dl>
<h2>What a strength is</h2>
<p>{WHAT_A_STRENGTH_IS.strip()}</p>"""


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _plots(summary: Mapping[str, Any]) -> str:
    figures = []
    for field, title, caption in PLOTS:
        curves = {}
        for kind, entry in summary["kinds"].items():
            points = sorted(entry["curve"], key=lambda point: point["strength"])
            curves[kind] = ([float(p["strength"]) for p in points], [_float(p[field]) for p in points])
        svg = plots.to_svg(plots.against_strength(curves, title), field.replace("_", "-"), f"{title} against strength, one line a kind")
        figures.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return f"""<h2>What the dial does</h2>
<p class="note">Shaded: from the base (0) to the trained adapter (1). All kinds meet at 0, where each is the base model.</p>
<div class="plots">{"".join(figures)}</div>"""


def _accuracy(summary: Mapping[str, Any]) -> str:
    heads = ("", "held-out accuracy", "95 % interval", "", "n", "trained parameters", "training time", "steps", "final loss")
    numeric = {1, 2, 4, 5, 6, 7, 8}
    rows = []
    for i, (kind, entry) in enumerate(summary["kinds"].items()):
        colour = f"var(--kind{i % len(plots.KINDS)})"
        cells = (
            f'<span class="kind" style="color: {colour}">{escape(kind)}</span>',
            _percent(entry["held_out_accuracy"]),
            _interval(entry["interval"]),
            _glyph(_float(entry["held_out_accuracy"]), entry["interval"], colour),
            f"{entry['n']:,}",
            f"{summary['trained_parameters'][kind]:,}",
            _seconds(entry["train_s"]),
            f"{entry['steps']:,}",
            "–" if entry["final_loss"] is None else f"{entry['final_loss']:.4f}",
        )
        rows.append(_row(cells, numeric))
    untrained, shorter = summary["untrained"], summary["baseline_shorter_accuracy"]
    bounds = untrained["interval"]
    glyph = _glyph(_float(untrained["held_out_accuracy"]), bounds, "var(--muted)")
    cells = ("untrained", _percent(untrained["held_out_accuracy"]), _interval(bounds), glyph, f"{untrained['n']:,}", "0", "", "", "")
    rows.append(_row(cells, numeric, "reference"))
    cells = ("shorter answer", _percent(shorter), "", _glyph(_float(shorter), None, "var(--muted)"), "", "0", "", "", "")
    rows.append(_row(cells, numeric, "reference"))
    return f"""<h2>Held-out accuracy</h2>
<p class="note">How often the implicit reward of the chosen answer is above that of the rejected one, on pairs never trained on; a tie
counts one half, so a model that has learnt nothing scores 50&nbsp;%. Interval: Wilson, 95&nbsp;%. “Shorter answer” is the rule that
always picks the shorter of the two: what could be reached without reading.</p>
<div class="scroll"><table><thead>{_row(heads, numeric, cell="th")}</thead><tbody>{"".join(rows)}</tbody></table></div>"""


def _row(cells: Sequence[str], numeric: set[int], name: str = "", cell: str = "td") -> str:
    number = ' class="number"'
    inner = "".join(f"<{cell}{number if i in numeric else ''}>{text}</{cell}>" for i, text in enumerate(cells))
    return f'<tr class="{name}">{inner}</tr>' if name else f"<tr>{inner}</tr>"


def _glyph(value: float, bounds: Sequence[float] | None, colour: str) -> str:
    """A dot with its interval on a track from 0 to 100 %, a tick at 50 %."""
    if not math.isfinite(value):
        return ""
    marks = [
        '<path d="M0 8H100" style="stroke: var(--grid); stroke-width: 1"/>',
        '<path d="M50 4V12" style="stroke: var(--muted); stroke-width: 0.8"/>',
    ]
    if bounds is not None:
        marks.append(f'<path d="M{100 * bounds[0]:.1f} 8H{100 * bounds[1]:.1f}" style="stroke: {colour}; stroke-width: 2.5"/>')
    marks.append(f'<circle cx="{100 * value:.1f}" cy="8" r="3.4" style="fill: {colour}"/>')
    return f'<svg class="interval" viewBox="-4 0 108 16" aria-hidden="true">{"".join(marks)}</svg>'


def _losses(summary: Mapping[str, Any]) -> str:
    losses = {kind: [_float(loss) for loss in entry["losses"]] for kind, entry in summary["kinds"].items() if entry["losses"]}
    if not losses:
        return ""
    # A preference loss starts at ln 2, where chosen and rejected are a coin toss; only then is that line worth drawing.
    coin = all(abs(values[0] - math.log(2)) < 0.01 for values in losses.values())
    figure = plots.against_steps(losses, "training loss (nats)", (math.log(2), "ln 2, a coin toss") if coin else None)
    svg = plots.to_svg(figure, "loss", "training loss against optimiser step, one line a kind")
    caption = "Loss of each batch (thin) and its mean over the last 5 % of the steps (thick)."
    return f'<h2>Training</h2>\n<div class="plots single"><figure>{svg}<figcaption>{caption}</figcaption></figure></div>'


def _samples(samples: Sequence[Mapping[str, Any]], kinds: list[str]) -> str:
    prompts: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        prompts.setdefault(sample["prompt"], []).append(sample)
    blocks = []
    for number, (prompt, rows) in enumerate(prompts.items()):
        strengths = sorted({float(strength) for row in rows for strength in row["answers"]})
        heads = "".join(f'<th class="answer">{_strength(strength)}</th>' for strength in strengths)
        lines = []
        for row in rows:
            answers = {float(strength): text for strength, text in row["answers"].items()}
            colour = f"var(--kind{kinds.index(row['kind']) % len(plots.KINDS)})" if row["kind"] in kinds else "inherit"
            cells = "".join(f'<td class="answer">{_answer(answers.get(strength))}</td>' for strength in strengths)
            lines.append(f'<tr><td class="kind" style="color: {colour}">{escape(row["kind"])}</td>{cells}</tr>')
        table = f'<table style="width: {5.6 + 14.5 * len(strengths):.1f}rem"><thead><tr><th class="kind">strength</th>{heads}</tr></thead>'
        table += f"<tbody>{''.join(lines)}</tbody></table>"
        opened = " open" if number == 0 else ""
        blocks.append(f'<details{opened}><summary>{escape(prompt)}</summary><div class="scroll answers">{table}</div></details>')
    if not blocks:
        return ""
    return f"""<h2>The same question, turned up</h2>
<p class="note">Greedy answers to held-out prompts. Scroll sideways for more strengths.</p>
{"".join(blocks)}"""


def _strength(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}") + {0.0: " (base)", 1.0: " (trained)"}.get(value, "")


def _answer(text: str | None) -> str:
    if text is None:
        return '<span class="words">not sampled</span>'
    count = len(text.split())
    words = "word" if count == 1 else "words"
    return f'<div class="text">{escape(text)}</div><div class="words">{count:,} {words}</div>'


def _costs(summary: Mapping[str, Any]) -> str:
    times = summary["times"]
    longest = max([*times.values(), 1e-9])
    numeric = {1}
    rows = "".join(
        f'<tr><td>{escape(phase)}</td><td class="number">{_seconds(value)}</td>'
        f'<td class="wide"><span class="bar" style="width: {100 * max(0.0, value) / longest:.1f}%"></span></td></tr>'
        for phase, value in times.items()
    )
    versions = "".join(_row((escape(name), escape(str(version))), set()) for name, version in summary["versions"].items())
    return f"""<h2>Time and memory</h2>
<p>{_seconds(summary["wall_s"])} in all; at most {summary["peak_rss_gb"]:.2f} GB of memory at once.</p>
<div class="scroll"><table style="min-width: min(32rem, 100%)"><thead>{_row(("phase", "time", ""), numeric, cell="th")}</thead>
<tbody>{rows}</tbody></table></div>
<h2>How to repeat it</h2>
<pre><code>{escape(summary["command"])}</code></pre>
<div class="scroll"><table><tbody>{versions}</tbody></table></div>"""
