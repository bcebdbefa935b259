"""Every step's numbers: `metrics.jsonl`, TensorBoard events, a progress bar, and the peak memory of the process."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from meetjax.errors import MeetjaxError

RECENT = 50
"""Steps that speed and ETA are averaged over."""
PLAIN_SECONDS = 10.0
"""Least seconds between two lines when stdout is not a terminal."""


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far, in GB (1e9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux kibibytes


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl` in file order, none when there is no file.

    A last line cut short, which is what a killed process leaves, is left out. Raises MeetjaxError for any other broken line.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines, rows = path.read_text(encoding="utf-8").split("\n"), []
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # what follows the last newline: nothing, or a row cut short
            break
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError):
            fix = "delete the line, or the file to start a new log"
            raise MeetjaxError(
                f"{path}:{number}: not a metrics row", expected="a JSON object with a step", found=line[:60], fix=fix
            ) from None
        rows.append(row)
    return rows


def _seconds(value: float) -> str:
    """12 s, 3 m 05 s, 2 h 07 m."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} m {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} m"


class _Speed:
    """Moving averages over the last `RECENT` timed steps; a step is timed from the end of the one before it."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.steps: collections.deque[tuple[float, float, float]] = collections.deque(maxlen=RECENT)

    def add(self, now: float, examples: float, tokens: float, timed: bool) -> None:
        if self.last is not None and timed:  # the first step has no step before it, so its compile time counts nowhere
            self.steps.append((now - self.last, examples, tokens))
        self.last = now

    def rates(self) -> tuple[float, float, float] | None:
        """(seconds per step, examples per second, tokens per second), None before the second step."""
        seconds = sum(step[0] for step in self.steps)
        if seconds <= 0:
            return None
        return seconds / len(self.steps), sum(step[1] for step in self.steps) / seconds, sum(step[2] for step in self.steps) / seconds


class MetricsLog:
    """Writes each step's floats to `folder/metrics.jsonl`, to TensorBoard events in `folder/tensorboard`, and to the terminal.

    A context manager. `start_step` is the last finished step (0 for a new run): rows of later steps, which a killed run may have left,
    are dropped first, so that the file has each step once. `unit` names an example in `{unit}_per_s`: `pairs` or `examples`.
    On a terminal there is one bar; elsewhere one plain line at most every 10 seconds. Raises MeetjaxError when a row cannot be written.
    Only one process of a run may open a log in a folder; the others say `writes=False`, and theirs does nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        start_step: int = 0,
        unit: str = "pairs",
        title: str = "train",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        writes: bool = True,
    ) -> None:
        self.folder, self.total, self.step = Path(folder), total_steps, start_step
        self.unit, self.title, self.writes, self.bar = unit, title, writes, None
        self.console = console or Console()
        self.clock, self.speed, self.last_line = clock, _Speed(), -math.inf
        self.path = self.folder / "metrics.jsonl"
        self.files, self.events = contextlib.ExitStack(), None

    def __enter__(self) -> Self:
        if not self.writes:
            return self
        try:
            self._open()
        except OSError as error:
            self.files.close()
            raise self._failed(error) from error
        if self.console.is_terminal:
            columns = (
                "[progress.description]{task.description}",
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                "{task.fields[numbers]}",
            )
            columns = [TextColumn(column) if isinstance(column, str) else column for column in columns]
            self.bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.step, numbers="compiling")
            self.bar.start()
        return self

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.folder) if row["step"] <= self.step]
        fresh = self.path.with_suffix(".jsonl.tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(fresh, self.path)  # a kill between the two leaves the old file whole
        self.file = self.files.enter_context(open(self.path, "a", encoding="utf-8"))  # noqa: SIM115, the stack closes it

    def _write_event(self, step: int, row: dict[str, float]) -> None:
        """One TensorBoard event. tensorboardX takes a second to import where torch is installed, for which no first step need wait."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue], made at run time
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue], made at run time

        if self.events is None:
            folder = self.folder / "tensorboard"
            folder.mkdir(exist_ok=True)
            # The synchronous writer: tensorboardX's threaded one blocks the caller for ever once its thread dies of a full disk.
            # Its names have a resolution of one second, so a quick resume needs the suffix to leave the first file alone.
            self.events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}.{time.monotonic_ns()}")
            self.files.callback(self.events.close)
            # TensorBoard hides events of this step and later ones that earlier files hold.
            self.events.write_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.events.flush()

    def write(
        self, step: int, metrics: Mapping[str, float], *, examples: float = 0, tokens: float = 0, timed: bool = True
    ) -> dict[str, float]:
        """Logs one step and returns its row: `metrics` as floats, `{unit}_per_s` and `tokens_per_s`.

        step: counted from 1, higher than any before. examples, tokens: how many this step trained on. timed: False for a step that
        compiled, whose seconds would spoil the speed. A value that is not finite is null in the file.
        """
        if step <= self.step:
            raise MeetjaxError(f"{self.path}: step", expected=f"more than {self.step}", found=step, fix="log each step once, in order")
        if not self.writes:
            self.step = step
            return dict(metrics)
        self.speed.add(self.clock(), examples, tokens, timed)
        row = {name: _number(name, value, self.path) for name, value in metrics.items()}
        rates = self.speed.rates()
        if rates is not None:
            row |= {f"{self.unit}_per_s": rates[1], "tokens_per_s": rates[2]}
        self.step = step
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self.file.write(json.dumps({"step": step} | finite) + "\n")
            self.file.flush()  # a killed process loses no finished step
            self._write_event(step, row)
        except OSError as error:
            raise self._failed(error) from error
        self._show(row, rates)
        return row

    def _show(self, row: dict[str, float], rates: tuple[float, float, float] | None) -> None:
        parts = []
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "rewards/accuracies" in row:
            parts.append(f"acc {row['rewards/accuracies']:.2f}")
        if rates is not None:
            parts += [f"{rates[1]:,.1f} {self.unit}/s", f"{rates[2]:,.0f} tok/s", f"eta {_seconds(rates[0] * (self.total - self.step))}"]
        if self.bar is not None:
            self.bar.update(self.task, completed=self.step, numbers="  ".join(parts))
        elif self.clock() - self.last_line >= PLAIN_SECONDS or self.step == self.total:
            self.last_line = self.clock()
            print("  ".join([f"{self.title} step {self.step}/{self.total}", *parts]), file=self.console.file, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        try:
            self.files.close()
        except OSError as closing:
            if error is None:  # else the first failure is the one worth telling
                raise self._failed(closing) from closing

    def _failed(self, error: OSError) -> MeetjaxError:
        fix = "free disk space or correct the folder, then run again: training resumes from its last checkpoint"
        return MeetjaxError(f"{error.filename or self.folder}: cannot write metrics", found=error.strerror or str(error), fix=fix)


def _number(name: str, value: object, path: Path) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise MeetjaxError(f"{path}: metric {name}", expected="one number", found=repr(value)[:60]) from None
