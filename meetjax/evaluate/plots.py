"""The figures of a report: small line plots, one line a kind, as inline SVG whose colours the page's style sheet sets."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Kind -> (x, y), drawn in this order; y is nan where nothing was measured."""

# Drawn in placeholder colours that `to_svg` swaps for CSS variables, so that one file reads well in light and in dark.
INK, MUTED, GRID, BAND = "#010101", "#020202", "#030303", "#040404"
KINDS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BAND: "--band"} | {c: f"--kind{i}" for i, c in enumerate(KINDS)}
MARKERS = ("o", "s", "^", "D", "v", "P")  # kinds differ in shape too, for print and for colour-blind readers
SIZE = (4.3, 3.1)  # inches of 72 CSS pixels: near the width of a phone, so that text keeps its size there
LABEL_GAP = 0.068  # least distance between two labels, as a fraction of the axis height
LABEL_LETTERS = 14  # a longer name is cut, so that the plot keeps more than half of the width
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def spread(heights: Sequence[float], gap: float, lo: float = 0.0, hi: float = 1.0) -> list[float]:
    """The heights moved as little as keeps every two at least `gap` apart and all in [lo, hi], order kept.

    When they cannot fit, `gap` shrinks until they do.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    if len(order) > 1:
        gap = min(gap, (hi - lo) / (len(order) - 1))
    groups: list[list[float]] = []  # [sum of wished first positions, size]: neighbours that touch move as one block
    for i in order:
        groups.append([heights[i], 1])
        while len(groups) > 1 and _start(groups[-2], gap, lo, hi) + groups[-2][1] * gap > _start(groups[-1], gap, lo, hi):
            total, size = groups.pop()
            groups[-1][0] += total - size * groups[-1][1] * gap
            groups[-1][1] += size
    placed = [_start(group, gap, lo, hi) + k * gap for group in groups for k in range(int(group[1]))]
    result = [0.0] * len(order)
    for i, height in zip(order, placed, strict=True):
        result[i] = height
    return result


def _start(group: Sequence[float], gap: float, lo: float, hi: float) -> float:
    total, size = group
    return min(max(total / size, lo), hi - (size - 1) * gap)


def _last_finite(ys: Sequence[float]) -> int | None:
    finite = [i for i, y in enumerate(ys) if math.isfinite(y)]
    return finite[-1] if finite else None


def _label(kind: str) -> str:
    return kind if len(kind) <= LABEL_LETTERS else kind[: LABEL_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _label_lines(axes: Axes, curves: Curves) -> None:
    """Writes each kind beside its line's end, in the line's colour, with a hair line where the label had to move."""
    ends = [(i, kind, xs[last], ys[last]) for i, (kind, (xs, ys)) in enumerate(curves.items()) if (last := _last_finite(ys)) is not None]
    lo, hi = axes.get_ylim()
    places = spread([(y - lo) / (hi - lo) for _, _, _, y in ends], LABEL_GAP, 0.02, 0.98)
    for (i, kind, x, y), place in zip(ends, places, strict=True):
        colour = KINDS[i % len(KINDS)]
        axes.annotate(
            _label(kind),
            parse_math=False,
            xy=(x, y),
            xytext=(1.05, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
        )


def _figure(curves: Curves, xlabel: str, ylabel: str, draw: Callable[[Axes], None]) -> Figure:
    figure = Figure(figsize=SIZE)
    # Fixed margins, so that plots side by side line up: the right one holds the longest label.
    right = 1 - (0.16 + 0.076 * max([6, *(len(_label(kind)) for kind in curves)])) / SIZE[0]
    axes = figure.add_axes((0.115, 0.185, right - 0.115, 0.725))
    draw(axes)
    axes.set_xlabel(xlabel)
    # Read from left to right, above the axis: a phone's reader need not turn the head.
    axes.set_title(ylabel, loc="left", fontsize=9.0, pad=9, x=-0.115 / (right - 0.115) + 0.02)
    _label_lines(axes, curves)
    return figure


def against_strength(curves: Curves, ylabel: str) -> Figure:
    """A quantity against strength, one marked line a kind; the band is the trained range from 0 (base) to 1 (adapter)."""

    def draw(axes: Axes) -> None:
        axes.axvspan(0, 1, color=BAND, linewidth=0, zorder=0)
        for i, (xs, ys) in enumerate(curves.values()):
            axes.plot(xs, ys, color=KINDS[i % len(KINDS)], marker=MARKERS[i % len(MARKERS)], markersize=4.5, zorder=3)
        strengths = sorted({x for xs, _ in curves.values() for x in xs})
        names = {0.0: "\nbase", 1.0: "\ntrained"}
        axes.set_xticks(strengths, [f"{x:g}".replace("-", "\N{MINUS SIGN}") + names.get(x, "") for x in strengths])
        _pad(axes, [y for _, ys in curves.values() for y in ys])

    with matplotlib.rc_context(STYLE):
        return _figure(curves, "strength", ylabel, draw)


def against_steps(losses: Mapping[str, Sequence[float]], ylabel: str, reference: tuple[float, str] | None = None) -> Figure:
    """Training loss against optimiser step, one line a kind: each step thin, the mean of the last 5 % of steps thick.

    `reference` is a (height, name) to draw as a dashed line.
    """
    curves = {kind: (range(1, len(ys) + 1), trailing_mean(ys, max(1, len(ys) // 20))) for kind, ys in losses.items()}

    def draw(axes: Axes) -> None:
        for i, (kind, (xs, ys)) in enumerate(curves.items()):
            axes.plot(xs, losses[kind], color=KINDS[i % len(KINDS)], linewidth=0.6, alpha=0.35)
            axes.plot(xs, ys, color=KINDS[i % len(KINDS)], zorder=3)
        axes.margins(x=0)
        heights = [y for ys in losses.values() for y in ys]
        if reference is not None:
            axes.axhline(reference[0], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            place = {"xy": (1, reference[0]), "xycoords": ("axes fraction", "data"), "xytext": (-2, 3), "textcoords": "offset points"}
            axes.annotate(reference[1], **place, color=MUTED, fontsize=7.5, ha="right")
            heights.append(reference[0])
        _pad(axes, heights)

    with matplotlib.rc_context(STYLE):
        return _figure(curves, "optimiser step", ylabel, draw)


def _pad(axes: Axes, heights: Sequence[float]) -> None:
    """Sets the y range to the finite heights with air around; a quantity that is never negative starts at 0."""
    finite = [y for y in heights if math.isfinite(y)] or [0.0]
    lo, hi = min(finite), max(finite)
    air = 0.07 * ((hi - lo) or abs(hi) or 1.0)
    axes.set_ylim(0.0 if lo >= 0 else lo - air, hi + air)


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    rows = np.asarray(values, dtype=np.float64)
    # Not by differences of a running sum: one nan would then reach every later value.
    return [float(rows[max(0, end - window) : end].mean()) for end in range(1, len(rows) + 1)]


def to_svg(figure: Figure, name: str, description: str) -> str:
    """An `<svg>` element for a page: no address in it, ids that start with `name`, colours and fonts from the page's style sheet."""
    buffer = io.StringIO()
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows what <svg> is; the addresses would only look like links
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = " ".join(f"{72 * inches:g}" for inches in SIZE)
    return re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {box}" role="img" aria-label="{escape(description)}">', svg, count=1)
