"""What a stage sees: from the recipe's data to its rows, in the form that its objective reads, with class, gates and markers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from meetjax.adapters.tree import Bank, check_gates, columns
from meetjax.data.audit import Audit, render_table, split_rows, then
from meetjax.data.cache import cached_rows
from meetjax.data.convert import BAD, GOOD, convert, goal_conditioned, instructed, with_request
from meetjax.data.edits import with_edit_weights
from meetjax.data.loader import Buckets, choose_buckets
from meetjax.data.partners import with_partners
from meetjax.data.records import Pair, form_of, read_records
from meetjax.data.tokenize import Rows, laid_lengths
from meetjax.errors import MeetjaxError
from meetjax.train.stage import Data, Stage, View


class Split(NamedTuple):
    """train: rows of the objective's form; held_out: pairs where the data has them, under the good class where the stage tells
    classes apart; contrast: the same pairs under the bad class, None where it does not; records: those held out; buckets: the
    padded lengths of all, those of the recipe or the best ones.
    """

    train: Rows
    held_out: Rows | None
    contrast: Rows | None
    records: list[Any]
    buckets: Buckets


def read_rows(data: Data, stage: Stage, tokenizer: Any, console: Console) -> Split:
    """Reads, splits, converts and tokenises `data` for a stage, and prints what was left out and why.

    The split comes first, so that it is the same for every stage. Raises MeetjaxError for data that cannot take the form.
    """
    native = form_of(data.path, data.split) if data.form == "auto" else data.form
    records: list[Any]
    records, read = read_records(data.path, native, data.split, data.limit, data.columns)
    held_out: list[Any] = []
    audits = [read]
    if data.held_out:
        records, held_out, split = split_rows(records, data.held_out, data.seed, together=native in ("labelled", "scored"))
        audits.append(split)
    form, goal = stage.objective.form, _goal(stage.view, native, stage.objective.form)
    best = max(record.score for record in records) if goal else 0.0
    records = goal_conditioned(records, goal, data.gap) if goal else convert(records, form, threshold=data.threshold, gap=data.gap)
    if stage.view.keep and form == "labelled":
        given = {record.label for record in records}
        if absent := sorted(set(stage.view.keep) - given):
            raise MeetjaxError("recipe: view.keep", expected=f"classes among {', '.join(map(str, sorted(given)))}", found=absent[0])
        records = [record for record in records if record.label in stage.view.keep]
    if asks := getattr(stage.objective, "asks", ()):
        records = instructed(records, asks, stage.view.instructions)
    rows, made = _tokenized(records, data, tokenizer, stage.view)
    if asks:  # prompts that differ from their first tokens on
        rows = dataclasses.replace(rows, shared_prompt=False)
    told = getattr(stage.objective, "classes", None)
    if told is not None and rows.classes is not None and not 0 <= rows.classes.min() <= rows.classes.max() < told:
        found = f"{rows.classes.min()} to {rows.classes.max()}"
        raise MeetjaxError("data: classes", expected=f"0 to {told - 1}, those of {type(stage.objective).__name__}", found=found)
    rows = _gated(rows, stage.view)
    if form == "edited":
        rows = with_edit_weights(rows)
    if getattr(stage.objective, "partners", False):
        rows = with_partners(rows, data.max_length, data.seed)
    console.print(render_table(then(*audits, made), f"{data.path} ({form})"))
    if not held_out:
        return Split(rows, None, None, [], _buckets(data, rows))
    if native in ("scored", "edited") or getattr(stage.objective, "reads_rewards", False):  # a reward of one answer alone says nothing
        held_out = convert(held_out, "pair", gap=data.gap)
    if goal:
        held_out = [dataclasses.replace(pair, prompt=with_request(pair.prompt, goal(best))) for pair in held_out]
    pairs, bad = isinstance(held_out[0], Pair), None
    good, audit = _tokenized(held_out, data, tokenizer, stage.view, GOOD if pairs else None)
    good = _gated(good, stage.view, GOOD if pairs else None)
    console.print(render_table(audit, "held out"))
    if pairs and _classes_told(stage.view, rows):
        bad = _gated(_tokenized(held_out, data, tokenizer, stage.view, BAD)[0], stage.view, BAD)
    return Split(rows, good, bad, held_out, _buckets(data, rows, good, *([bad] if bad else [])))


def _buckets(data: Data, *tables: Rows) -> Buckets:
    """The recipe's padded lengths, which must hold every row, or the best ones."""
    if not data.buckets:
        return choose_buckets(*tables)
    longest = max(int(laid_lengths(rows).max()) for rows in tables)
    if data.buckets[-1] < longest:
        expected, fix = f"a last one of {longest} or more, the longest row", "add one, leave them to be chosen, or lower data.max_length"
        raise MeetjaxError("recipe: data.buckets", expected=expected, found=data.buckets, fix=fix)
    return data.buckets


def _goal(view: View, native: str, form: str) -> Callable[[float], str] | None:
    """The text that asks for a score, where the view has one."""
    if not view.goal:
        return None
    if native != "scored" or form != "pair":
        expected = "scored records and an objective of pairs (--set data.form=scored)"
        raise MeetjaxError("recipe: view.goal", expected=expected, found=f"{native} records and an objective of form {form}")
    try:
        assert view.goal.format(score=1.0) != view.goal.format(score=2.0)
    except (AssertionError, LookupError, ValueError) as error:
        raise MeetjaxError("recipe: view.goal", expected="a text with {score:g} in it", found=repr(view.goal)) from error
    return lambda score: view.goal.format(score=score)


def check_columns(bank: Bank, rows: Rows, where: str) -> None:
    """Raises MeetjaxError when rows do not say how far they open each of several gate columns."""
    if rows.gates is not None:
        check_gates(bank, rows.gates, len(rows))
    elif columns(bank) > 1:
        expected = f"gates for {columns(bank)} columns, or controls={columns(bank)}"
        raise MeetjaxError(f"recipe: {where}.view", expected=expected, found="none: every row would open all of them")


def _tokenized(records: list[Any], data: Data, tokenizer: Any, view: View, label: int | None = None) -> tuple[Rows, Audit]:
    """Rows and audit; with a label, all records stand under that class's marker. A prompt that asks for a score is never cut."""
    own = view.markers if label is None or len(view.markers) < 2 else (view.markers[label],)
    rows, made = cached_rows(records, tokenizer, data.max_length, data.template, own, whole=bool(view.goal))
    return dataclasses.replace(rows, shared_prompt=data.shared_prompt), made


def _gated(rows: Rows, view: View, label: int | None = None) -> Rows:
    """The rows with the gates of their class, or all with those of class `label`."""
    if not view.controls and not view.gates:
        return rows
    table = np.asarray(view.gates or np.eye(view.controls), np.float32)
    if len(table) == 1:
        classes = np.zeros(len(rows), np.int32)
    elif label is not None:
        classes = np.full(len(rows), label, np.int32)
    elif rows.classes is None:
        raise MeetjaxError("recipe: view", expected="labelled rows, or gates for one class", found=f"gates for {len(table)} classes")
    else:
        classes = rows.classes
    if classes.max() >= len(table):
        raise MeetjaxError("recipe: view", expected=f"gates for class {classes.max()}", found=f"{len(table)} classes")
    wanted = view.keep or range(len(table))
    if label is None and len(table) > 1 and (absent := sorted(set(wanted) - set(classes.tolist()))):
        raise MeetjaxError(f"data: class {absent[0]}", expected="at least one row of each class that trains", found="none")
    return dataclasses.replace(rows, gates=table[classes])


def _classes_told(view: View, rows: Rows) -> bool:
    """Whether training tells good from bad: both occur, and their gates or markers differ."""
    apart = len(view.gates) > 1 or (view.controls > 1 and not view.gates) or len(view.markers) > 1
    return apart and rows.classes is not None and {BAD, GOOD} <= set(rows.classes.tolist())
