"""What a compiled program moves between devices, read from its text: compilers count the body of a loop once, and links not at all."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s4": 0.5,
    "u4": 0.5,
    "bf16": 2,
    "f16": 2,
    "u16": 2,
    "s16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OP = re.compile(rf"= (\(?[^=]*?\)?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|async_computation|called_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """bytes: sent by one device a run, by kind; largest: numbers in the largest array that an all-gather makes on one device."""

    bytes: dict[str, float]
    largest: int


def count_traffic(text: str, unknown: int = 1) -> Traffic:
    """Reads the text of a compiled program (`compiled.as_text()`); unknown: runs of a loop whose bound is not in the text.

    A ring of n devices sends (n - 1) / n of what it gathers, scatters or exchanges, and twice that of what it reduces everywhere. Where a
    compiler spreads one collective over several fusions, all bear its channel, and it counts once.
    """
    bodies = _computations(text)
    calls: dict[str, list[tuple[str, int]]] = {}
    for name, lines in bodies.items():
        for line in lines:
            loop = _WHILE.search(line)
            trips = _trips(line, bodies.get(loop[1], []), unknown) if loop else 1
            for one, several in _CALLED.findall(line):
                for called in [one] if one else [part.strip().lstrip("%") for part in several.split(",")]:
                    calls.setdefault(called, []).append((name, trips if loop and called == loop[2] else 1))
    runs: dict[str, int] = {}

    def runs_of(name: str) -> int:
        if name not in runs:
            # A fusion is called once wherever it is written: several callers are phases of one.
            runs[name] = max((runs_of(caller) * trips for caller, trips in calls.get(name, [])), default=1)
        return runs[name]

    moved, largest, seen = dict.fromkeys(KINDS, 0.0), 0, set()
    for name, lines in bodies.items():
        for line in lines:
            if (found := _OP.search(line)) is None:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            phase = (str(_SHAPE.findall(found[1])), found[2], channel[1]) if channel else (line,)
            if phase in seen:
                continue
            seen.add(phase)
            shapes = [(kind, [int(d) for d in dims.split(",") if d]) for kind, dims in _SHAPE.findall(found[1]) if kind in _WIDTHS]
            if found[3] and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2 :]  # (operands, results, ...) of an asynchronous start
            size = sum(_WIDTHS[kind] * math.prod(dims) for kind, dims in shapes)
            kind: Any = found[2]
            ways = _ways(line)
            if name.startswith("all-reduce-scatter"):  # a sum of which each device keeps its part, as a TPU's compiler writes it
                kind, size = "reduce-scatter", size / ways
            if kind == "all-gather":
                largest = max(largest, *(math.prod(dims) for _, dims in shapes))
            share = {"all-reduce": 2 * (ways - 1) / ways, "reduce-scatter": ways - 1, "collective-permute": 1}.get(kind, (ways - 1) / ways)
            moved[kind] += runs_of(name) * size * share
    return Traffic({kind: amount for kind, amount in moved.items() if amount}, largest)


def _computations(text: str) -> dict[str, list[str]]:
    bodies, own = {}, None
    for line in text.splitlines():
        if (head := _HEAD.match(line)) is not None:
            own = bodies.setdefault(head[2], [])
        elif own is not None:
            own.append(line)
    return bodies


def _trips(line: str, condition: list[str], unknown: int) -> int:
    """How often a loop runs: told beside it, or the constant that its condition compares a count from 0 with."""
    if (known := _TRIPS.search(line)) is not None:
        return int(known[1])
    constants = {m[1]: int(m[2]) for m in (re.search(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", x) for x in condition) if m}
    for root in condition:
        compared = re.search(r"ROOT .* compare\(.*?%([\w.\-]+)\), direction=LT", root)
        if compared and compared[1] in constants:
            return constants[compared[1]]
    return unknown


def _ways(line: str) -> int:
    """Devices of one group of a collective."""
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line)) is not None:
        return listed[1].count(",") + 1
    if (table := re.search(r"replica_groups=\[\d+,(\d+)\]", line)) is not None:
        return int(table[1])
    if (named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2
