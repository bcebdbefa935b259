"""Records: preference pairs, demonstrations, labelled and scored answers, read from every common layout of columns."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from meetjax.data.audit import Audit, Finding, require_rows, tally
from meetjax.data.sources import iterate_rows
from meetjax.errors import MeetjaxError

ROLES = ("system", "developer", "user", "assistant", "tool")
Form = Literal["pair", "completion", "labelled", "scored", "edited"]
HH_START = "\n\nHuman:"
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

# Reasons for leaving a row out. An empty answer is only noted here and left out when tokenised, so that a seeded split of
# a set does not depend on it.
EMPTY = "empty answer"
IDENTICAL = "chosen and rejected are identical"
DIFFERENT = "the two sides do not share the prompt"
NO_PROMPT = "no message before the answer"
NOT_ASSISTANT = "the answer is not one assistant turn"


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


Prompt = tuple[Message, ...] | str
"""A conversation, or plain text."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred; `where` is the `file:line` it came from."""

    prompt: Prompt
    chosen: str
    rejected: str
    where: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A demonstrated answer to a prompt; `where` is the `file:line` it came from."""

    prompt: Prompt
    completion: str
    where: str


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An answer of a class, 0 for bad and 1 for good or any other numbering; `where` is the `file:line` it came from."""

    prompt: Prompt
    completion: str
    label: int
    where: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """An answer with a score, to be compared only within its prompt; `where` is the `file:line` it came from."""

    prompt: Prompt
    completion: str
    score: float
    where: str


@dataclasses.dataclass(frozen=True)
class Edited:
    """An answer and a revision of it; `where` is the `file:line` it came from."""

    prompt: Prompt
    original: str
    revised: str
    where: str


@dataclasses.dataclass(frozen=True)
class Instructed:
    """A labelled answer behind several prompts that ask for it differently; made by `convert.instructed`."""

    prompts: tuple[Prompt, ...]
    completion: str
    label: int
    where: str


Record = Pair | Completion | Labelled | Scored | Edited | Instructed


def answers(record: Record) -> tuple[str, ...]:
    """The record's C answers in the order of `Batch`'s answer axis, the better first, or (completion,) once a prompt."""
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    if isinstance(record, Edited):
        return record.revised, record.original
    return (record.completion,) * len(prompts(record))


def prompts(record: Record) -> tuple[Prompt, ...]:
    """The record's prompts: one for all its answers, or one an answer."""
    return record.prompts if isinstance(record, Instructed) else (record.prompt,)


def read_records(
    source: str | Path, form: Form, split: str | None = None, limit: int | None = None, columns: tuple[str, ...] = ()
) -> tuple[list[Any], Audit]:
    """Reads records of a form and the audit of the rows left out.

    `source` and `split` are those of `sources.iterate_rows`; `limit` reads only the first rows; `columns` are the
    source's names of `prompt` and `completion`, () for these. Layouts, told by the columns:

    * pair: `prompt`, `chosen`, `rejected`, each a string or a list of {"role", "content"} messages; or `chosen`, `rejected` alone:
      whole conversations, or dialogue strings with turns at "\\n\\nHuman:" and "\\n\\nAssistant:";
    * completion: `prompt`, `completion`; `messages`, of which the last assistant turn is the answer; or a pair's columns, of which
      the chosen answer is read;
    * labelled: `prompt`, `completion` and `label`, true, false or a class number from 0 (as text too, as CSV has it);
    * edited: `prompt`, `original` and `revised`;
    * scored: `prompt`, `completion` and `score`; or a pair's columns with `score_chosen` and `score_rejected`, two records a row.

    A pair file read as demonstrations gives the chosen answers of exactly the rows that it gives as pairs, in the same
    order, so that one seeded split serves both. Raises MeetjaxError with `file:line` for a missing column, a field of the
    wrong type and whatever `iterate_rows` raises, and with the top reason when no row is usable.
    """
    if form not in PARSERS:
        raise MeetjaxError("data form", expected=" or ".join(PARSERS), found=repr(form))
    if limit is not None and limit < 1:
        raise MeetjaxError(f"{source}: limit", expected="at least 1 row", found=limit)
    records: list[Any] = []
    excluded: dict[str, Finding] = {}
    noted: dict[str, Finding] = {}
    usable = 0
    for number, (row, where) in enumerate(iterate_rows(source, split), start=1):
        if columns:
            _require_columns(row, columns, where)
            row = row | {"prompt": row[columns[0]], "completion": row[columns[1]]}
        found = PARSERS[form](row, where)
        if isinstance(found, str):
            tally(excluded, found, where)
        for record in [] if isinstance(found, str) else found if isinstance(found, list) else [found]:
            records.append(record)
            empty = not all(answer.strip() for answer in answers(record))
            usable += not empty
            if empty:
                tally(noted, f"{EMPTY}, left out when tokenised", where)
        if number == limit:
            break
    if usable == 0 and records:
        tally(excluded, EMPTY, records[0].where, len(records))
    require_rows(Audit(usable, excluded), source)
    return records, Audit(len(records), excluded, noted)


def form_of(source: str | Path, split: str | None = None) -> Form:
    """The form that the columns of the first row tell; a completion where they tell nothing."""
    row, _ = next(iterate_rows(source, split), ({}, ""))
    told: tuple[tuple[str, Form], ...] = (("rejected", "pair"), ("label", "labelled"), ("score", "scored"), ("revised", "edited"))
    found: list[Form] = [form for column, form in told if column in row]
    return found[0] if found else "completion"


def parse_pair(row: Mapping[str, Any], where: str) -> Pair | str:
    """The row's pair, or the reason why it has none; raises MeetjaxError for a missing column or a wrong type."""
    _require_columns(row, ("chosen", "rejected"), where)
    if "prompt" in row:
        sides = [_answer_after(row["prompt"], row, field, where) for field in ("chosen", "rejected")]
    else:
        sides = [_whole_conversation(row, field, where) for field in ("chosen", "rejected")]
    for side in sides:
        if isinstance(side, str):
            return side
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        return DIFFERENT
    if chosen.strip() == rejected.strip():
        return IDENTICAL
    return Pair(prompt, chosen, rejected, where)


def parse_completion(row: Mapping[str, Any], where: str) -> Completion | str:
    """The row's demonstration, or the reason why it has none; raises MeetjaxError like `parse_pair`."""
    if "completion" in row:
        _require_columns(row, ("prompt", "completion"), where)
        found = _answer_after(row["prompt"], row, "completion", where)
    elif "messages" in row:
        found = _last_assistant_turn(_messages(row["messages"], "messages", where))
    elif "chosen" in row or "rejected" in row:
        pair = parse_pair(row, where)
        found = pair if isinstance(pair, str) else (pair.prompt, pair.chosen)
    else:
        raise _missing("prompt and completion, or messages, or chosen and rejected", row, where)
    return found if isinstance(found, str) else Completion(*found, where)


def parse_labelled(row: Mapping[str, Any], where: str) -> Labelled | str:
    """The row's answer and class, or the reason why it has none; raises MeetjaxError like `parse_pair`."""
    _require_columns(row, ("prompt", "completion", "label"), where)
    label, found = _plain(row["label"]), _answer_after(row["prompt"], row, "completion", where)
    if not isinstance(label, int) or not 0 <= label < 2**31:
        raise MeetjaxError(f"{where}: field 'label'", expected="true, false or a class number from 0", found=repr(label))
    return found if isinstance(found, str) else Labelled(*found, int(label), where)


def parse_scored(row: Mapping[str, Any], where: str) -> Scored | list[Scored] | str:
    """The row's answer and score, those of both sides of a scored pair, or the reason why it has none; raises like `parse_pair`."""
    if "rejected" in row:
        _require_columns(row, ("score_chosen", "score_rejected"), where)
        pair = parse_pair(row, where)
        if isinstance(pair, str):
            return pair
        sides = ((pair.chosen, "score_chosen"), (pair.rejected, "score_rejected"))
        return [Scored(pair.prompt, answer, _score(row, column, where), where) for answer, column in sides]
    _require_columns(row, ("prompt", "completion", "score"), where)
    found = _answer_after(row["prompt"], row, "completion", where)
    return found if isinstance(found, str) else Scored(*found, _score(row, "score", where), where)


def parse_edited(row: Mapping[str, Any], where: str) -> Edited | str:
    """The row's answer and revision, or the reason why it has none; raises MeetjaxError like `parse_pair`."""
    _require_columns(row, ("prompt", "original", "revised"), where)
    sides = [_answer_after(row["prompt"], row, field, where) for field in ("original", "revised")]
    for side in sides:
        if isinstance(side, str):
            return side
    (prompt, original), (_, revised) = sides
    return Edited(prompt, original, revised, where)


def _score(row: Mapping[str, Any], column: str, where: str) -> float:
    value = _plain(row[column])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise MeetjaxError(f"{where}: field '{column}'", expected="a finite number", found=repr(value))
    return float(value)


def _plain(value: Any) -> Any:
    """What a cell of a CSV file, which is text, says: true, false or a number; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue string, split at "\\n\\nHuman:" and "\\n\\nAssistant:", without the blanks around them."""
    parts = HH_TURN.split(text)[1:]
    return tuple(Message(HH_ROLES[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True))


def _answer_after(prompt: Any, row: Mapping[str, Any], field: str, where: str) -> tuple[Prompt, str] | str:
    """Prompt and answer of a layout with a `prompt` column: text or messages on either side."""
    answer = row[field]
    if not isinstance(prompt, (str, list, tuple)):
        raise _wrong_type("prompt", prompt, where)
    talk = prompt if isinstance(prompt, str) else _messages(prompt, "prompt", where)
    if talk == ():
        return NO_PROMPT
    if isinstance(answer, str):
        return talk, answer
    turns = _messages(answer, field, where)
    if isinstance(talk, str):
        if len(turns) == 1:
            talk = (Message("user", talk),)
        elif not any(turn.content == talk for turn in turns[:-1]):
            return DIFFERENT
        else:  # the whole conversation, of which the prompt column repeats a turn
            talk = turns[:-1]
    if turns[: len(talk)] == talk:
        turns = turns[len(talk) :]
    if len(turns) != 1 or turns[0].role != "assistant":
        return NOT_ASSISTANT
    return talk, turns[0].content


def _whole_conversation(row: Mapping[str, Any], field: str, where: str) -> tuple[Prompt, str] | str:
    """Prompt and last turn of a side that holds the whole conversation, as messages or as a dialogue string."""
    value = row[field]
    if isinstance(value, str):
        if not value.startswith(HH_START):
            raise _missing("prompt (or dialogues that start with \\n\\nHuman:)", row, where)
        turns = parse_dialogue(value)
    else:
        turns = _messages(value, field, where)
    if not turns or turns[-1].role != "assistant":
        return NOT_ASSISTANT
    return (turns[:-1], turns[-1].content) if turns[:-1] else NO_PROMPT


def _last_assistant_turn(turns: tuple[Message, ...]) -> tuple[Prompt, str] | str:
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        return NOT_ASSISTANT
    return (turns[:last], turns[last].content) if last else NO_PROMPT


def _messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(field, value, where)
    turns = []
    for i, turn in enumerate(value):
        at = f"{where}: field '{field}', message {i}"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            found = sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__
            raise MeetjaxError(at, expected="an object with role and content", found=found)
        if turn["role"] not in ROLES:
            raise MeetjaxError(f"{at}: role", expected=f"one of {', '.join(ROLES)}", found=repr(turn["role"]))
        if not isinstance(turn["content"], str):
            raise MeetjaxError(f"{at}: content", expected="a string", found=type(turn["content"]).__name__)
        turns.append(Message(turn["role"], turn["content"]))
    return tuple(turns)


def _require_columns(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        if column not in row:
            raise _missing(column, row, where)


def _missing(column: str, row: Mapping[str, Any], where: str) -> MeetjaxError:
    return MeetjaxError(f"{where}: missing column", expected=column, found=f"columns {', '.join(sorted(row)) or '(none)'}")


def _wrong_type(field: str, value: Any, where: str) -> MeetjaxError:
    return MeetjaxError(f"{where}: field '{field}'", expected="a string or a list of messages", found=type(value).__name__)


PARSERS = {"pair": parse_pair, "completion": parse_completion, "labelled": parse_labelled, "scored": parse_scored, "edited": parse_edited}
