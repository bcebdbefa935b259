"""From one form of records to another, each step said in the recipe; scores are compared within a prompt and never across."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from meetjax.data.records import Completion, Edited, Form, Instructed, Labelled, Message, Pair, Prompt, Record, Scored
from meetjax.errors import MeetjaxError
from meetjax.types import Instruction

FORM_OF: dict[type, Form] = {Pair: "pair", Completion: "completion", Labelled: "labelled", Scored: "scored", Edited: "edited"}
BAD, GOOD = 0, 1
"""Classes of the answers of a pair."""


def convert(records: Sequence[Record], form: Form, *, threshold: float | None = None, gap: float = 0.0) -> list[Any]:
    """The records in another form; those already in it are returned as they are.

    pair -> completion (the chosen answer), labelled (chosen good, rejected bad), edited (rejected revised to chosen); edited -> pair;
    labelled -> completion (the good answers), pair;
    scored -> labelled (good from `threshold` on), pair (best against worst, at least `gap` apart).
    Raises MeetjaxError for records of several forms, a form that these cannot become, and when nothing is left.
    """
    forms: set[Form] = {FORM_OF[type(record)] for record in records}
    if len(forms) != 1:
        raise MeetjaxError("records", expected="records of one form", found=" and ".join(sorted(forms)) or "none")
    given: Form = forms.pop()
    if given == form:
        return list(records)
    steps: dict[tuple[Form, Form], Callable[[Any], list[Any]]] = {
        ("pair", "completion"): lambda pairs: [Completion(pair.prompt, pair.chosen, pair.where) for pair in pairs],
        ("pair", "labelled"): labelled_from_pairs,
        ("pair", "edited"): lambda pairs: [Edited(pair.prompt, pair.rejected, pair.chosen, pair.where) for pair in pairs],
        ("edited", "pair"): lambda rows: [Pair(row.prompt, row.revised, row.original, row.where) for row in rows],
        ("labelled", "completion"): lambda rows: [Completion(row.prompt, row.completion, row.where) for row in rows if row.label == GOOD],
        ("labelled", "pair"): pairs_from_labelled,
        ("scored", "labelled"): lambda rows: labelled_from_scores(rows, threshold),
        ("scored", "pair"): lambda rows: pairs_from_scores(rows, gap),
    }
    if (given, form) not in steps:
        possible = sorted({given} | {end for start, end in steps if start == given})
        raise MeetjaxError("data form", expected=f"{' or '.join(possible)}, which {given} records can become", found=form)
    made = steps[given, form](records)
    if not made:
        raise MeetjaxError(f"{given} records as {form}", expected="at least one", found=f"none from {len(records):,} records")
    return made


def labelled_from_pairs(pairs: Sequence[Pair]) -> list[Labelled]:
    """Two answers a pair, side by side: chosen good, rejected bad."""
    return [
        Labelled(pair.prompt, answer, label, pair.where) for pair in pairs for answer, label in ((pair.chosen, GOOD), (pair.rejected, BAD))
    ]


def pairs_from_labelled(rows: Sequence[Labelled]) -> list[Pair]:
    """Each good answer against a bad one of the same prompt, as many as there are of the rarer kind; other prompts give none."""
    pairs = []
    for own in _by_prompt(rows):
        good, bad = ([row for row in own if row.label == label] for label in (GOOD, BAD))
        pairs += [Pair(a.prompt, a.completion, b.completion, a.where) for a, b in zip(good, bad, strict=False)]
    return pairs


def labelled_from_scores(rows: Sequence[Scored], threshold: float | None) -> list[Labelled]:
    """Good where score >= threshold, else bad. Raises MeetjaxError without a threshold, and when it leaves a class empty."""
    if threshold is None:
        raise MeetjaxError("data.threshold", expected="the score from which an answer is good", found="none")
    made = [Labelled(row.prompt, row.completion, GOOD if row.score >= threshold else BAD, row.where) for row in rows]
    if len({row.label for row in made}) < 2:
        low, high = min(row.score for row in rows), max(row.score for row in rows)
        raise MeetjaxError("data.threshold", expected=f"a score that splits the answers, which score {low:g} to {high:g}", found=threshold)
    return made


def pairs_from_scores(rows: Sequence[Scored], gap: float = 0.0) -> list[Pair]:
    """The best against the worst answer of each prompt, where they are more than `gap` apart (equal scores give no pair).

    Raises MeetjaxError when no prompt has such a spread.
    """
    pairs = []
    for own in _by_prompt(rows):
        best, worst = max(own, key=lambda row: row.score), min(own, key=lambda row: row.score)
        if best.score - worst.score > gap:
            pairs.append(Pair(best.prompt, best.completion, worst.completion, best.where))
    if not pairs:
        raise MeetjaxError("scored records as pairs", expected=f"a prompt whose scores are more than {gap:g} apart", found="none")
    return pairs


def _by_prompt(rows: Sequence[Any]) -> list[list[Any]]:
    """Rows of one prompt together, in the order in which the prompts come first."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    return list(groups.values())


def goal_conditioned(rows: Sequence[Scored], goal: Callable[[float], str], gap: float = 0.0) -> list[Pair]:
    """Reward-augmented pairs (Zhang et al. 2024, arXiv 2410.08067): each answer is once the goal that its own score sets.

    Of two answers to a prompt, more than `gap` apart, each is preferred to the other under a prompt that asks for its own score:
    `goal(score)` is the text of that request. Raises MeetjaxError when no prompt has such a spread.
    """
    pairs = []
    for own in _by_prompt(rows):
        for a, b in itertools.permutations(own, 2):
            if abs(a.score - b.score) > gap:
                pairs.append(Pair(with_request(a.prompt, goal(a.score)), a.completion, b.completion, a.where))
    if not pairs:
        raise MeetjaxError(
            "scored records as pairs with a goal", expected=f"a prompt whose scores are more than {gap:g} apart", found="none"
        )
    return pairs


def instructed(rows: Sequence[Labelled], asked: Sequence[Instruction], instructions: Sequence[str]) -> list[Instructed]:
    """Each answer under several instructions: none ("plain"), its own class's, the other class's, the good or the bad one.

    instructions: the texts by class, bad first. Raises MeetjaxError for labels other than 0 and 1, and for other than
    two texts where they are asked for.
    """
    if len(instructions) != 2 and set(asked) != {"plain"}:
        raise MeetjaxError("view.instructions", expected="two texts, for bad and for good answers", found=len(instructions))
    made = []
    for row in rows:
        if row.label not in (BAD, GOOD):
            raise MeetjaxError(f"{row.where}: label", expected="0 or 1, answers with an instruction of their own", found=row.label)
        classes = {"own": row.label, "other": 1 - row.label, "good": GOOD, "bad": BAD}
        prompts = [row.prompt if name == "plain" else with_request(row.prompt, instructions[classes[name]]) for name in asked]
        made.append(Instructed(tuple(prompts), row.completion, row.label, row.where))
    return made


def with_request(prompt: Prompt, request: str) -> Prompt:
    """The prompt with the request in its system turn, before what stands there; plain text has it in front."""
    if isinstance(prompt, str):
        return f"{request}\n\n{prompt}"
    if prompt[0].role == "system":
        return (Message("system", f"{request}\n\n{prompt[0].content}"), *prompt[1:])
    return (Message("system", request), *prompt)
