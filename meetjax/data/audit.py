"""`Audit`: what happened to the rows on their way to training, and the split by prompt that it has to vouch for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from meetjax.errors import MeetjaxError

Record = TypeVar("Record")
LEAKAGE = "prompt also held out"


@dataclasses.dataclass(frozen=True)
class Finding:
    """How many rows one reason concerns and where (`file:line`) the first of them is."""

    count: int
    where: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """Rows kept by a step, rows it left out or only remarked on (by reason), and additive counts such as tokens."""

    kept: int = 0
    excluded: dict[str, Finding] = dataclasses.field(default_factory=dict)
    noted: dict[str, Finding] = dataclasses.field(default_factory=dict)
    stats: dict[str, int] = dataclasses.field(default_factory=dict)


def tally(findings: dict[str, Finding], reason: str, where: str, count: int = 1) -> None:
    """Adds `count` rows to `findings[reason]` in place; the first `where` stays."""
    seen = findings.get(reason)
    findings[reason] = Finding(count, where) if seen is None else Finding(seen.count + count, seen.where)


def merge(*parts: Audit) -> Audit:
    """The audit of several sources read side by side: everything adds up."""
    excluded: dict[str, Finding] = {}
    noted: dict[str, Finding] = {}
    stats: dict[str, int] = {}
    for part in parts:
        for total, findings in ((excluded, part.excluded), (noted, part.noted)):
            for reason, finding in findings.items():
                tally(total, reason, finding.where, finding.count)
        for name, value in part.stats.items():
            stats[name] = stats.get(name, 0) + value
    return Audit(sum(part.kept for part in parts), excluded, noted, stats)


def then(*steps: Audit) -> Audit:
    """The audit of steps run one after the other: findings add up, the last step says what is kept."""
    return dataclasses.replace(merge(*steps), kept=steps[-1].kept)


def require_rows(audit: Audit, source: object) -> None:
    """Raises MeetjaxError naming the most frequent reason when nothing is left of `source`."""
    if audit.kept > 0:
        return
    if not audit.excluded:
        raise MeetjaxError(f"{source}: no rows", expected="at least one row", found="none")
    reason, finding = max(audit.excluded.items(), key=lambda item: item[1].count)
    raise MeetjaxError(
        f"{source}: no row is usable",
        expected="at least one usable row",
        found=f"{finding.count:,} of {sum(f.count for f in audit.excluded.values()):,} rows left out for: {reason}",
        fix=f"look at the first one, {finding.where}",
    )


def render_table(audit: Audit, title: str = "data") -> Table:
    """The audit as a `rich` table, one row a reason, for a terminal."""
    table: Any = Table(title=title)
    table.add_column("what")
    table.add_column("rows", justify="right")
    table.add_column("first at", overflow="fold")
    table.add_row("kept", f"{audit.kept:,}", "")
    for heading, findings in (("left out", audit.excluded), ("noted", audit.noted)):
        for reason, finding in findings.items():
            table.add_row(f"{heading}: {reason}", f"{finding.count:,}", finding.where)
    for name, value in audit.stats.items():
        table.add_row(name, f"{value:,}", "")
    return table


def split_rows(records: Sequence[Record], held_out: int, seed: int = 0, together: bool = False) -> tuple[list[Record], list[Record], Audit]:
    """Splits records into (train, held out, audit) so that no prompt is on both sides.

    Rows are shuffled with `numpy.random.default_rng(seed).permutation(len(records))`; the last `held_out` are held out, the
    others train, except those whose prompt is also held out: they are held out too (`together`, for answers that are judged beside
    others to their prompt), or removed and counted. The audit's `kept` is the number of training rows. Pairs and demonstrations
    read from one pair file split alike.
    Raises MeetjaxError when `held_out` leaves no training row or is not positive, or when `seed` is negative.
    """
    if seed < 0:
        raise MeetjaxError("split: seed", expected="a number >= 0", found=seed)
    if not 0 < held_out < len(records):
        raise MeetjaxError("split: held_out", expected=f"1 to {len(records) - 1} of {len(records)} rows", found=held_out)
    order = np.random.default_rng(seed).permutation(len(records))
    cut = len(records) - held_out
    kept_back = [records[i] for i in order[cut:]]
    prompts = {record.prompt for record in kept_back}
    train, excluded = [], {}
    for i in order[:cut]:
        record = records[i]
        if record.prompt not in prompts:
            train.append(record)
        elif together:
            kept_back.append(record)
        else:
            tally(excluded, LEAKAGE, record.where)
    audit = Audit(len(train), excluded, {}, {"held-out rows": len(kept_back), "held-out prompts": len(prompts)})
    require_rows(audit, "split: training part")
    return train, kept_back, audit
