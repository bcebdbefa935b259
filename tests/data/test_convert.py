"""Conversions between forms of records: what becomes of each row, and what is refused."""

from __future__ import annotations

import json

import pytest

from meetjax.data.convert import convert, goal_conditioned
from meetjax.data.records import Completion, Labelled, Message, Pair, Scored, form_of, read_records
from meetjax.errors import MeetjaxError

PAIRS = [Pair("p", "a", "b", "f:1"), Pair("q", "c", "d", "f:2")]
LABELLED = [Labelled("p", "a", 1, "f:1"), Labelled("p", "b", 0, "f:1"), Labelled("q", "c", 1, "f:2"), Labelled("q", "d", 0, "f:2")]
SIDES = {"prompt": "p", "chosen": "a", "rejected": "b"}
SCORED = [Scored("p", "a", 7.0, "f:1"), Scored("p", "b", 3.0, "f:2"), Scored("q", "c", 5.0, "f:3"), Scored("p", "e", 5.0, "f:4")]


def test_pairs_become_labelled_and_come_back():
    assert convert(PAIRS, "labelled") == LABELLED
    assert convert(LABELLED, "pair") == PAIRS
    assert convert(PAIRS, "completion") == convert(LABELLED, "completion") == [Completion("p", "a", "f:1"), Completion("q", "c", "f:2")]
    for records, form in ((PAIRS, "pair"), (LABELLED, "labelled"), (SCORED, "scored")):
        assert convert(records, form) == records


def test_labelled_answers_pair_only_within_a_prompt():
    rows = [Labelled("p", "a", 1, "f:1"), Labelled("q", "b", 0, "f:2"), Labelled("p", "c", 1, "f:3"), Labelled("p", "d", 0, "f:4")]
    assert convert(rows, "pair") == [Pair("p", "a", "d", "f:1")]
    with pytest.raises(MeetjaxError, match="labelled records as pair; expected at least one; found none from 2 records"):
        convert(rows[:2], "pair")


def test_scores_become_pairs_within_a_prompt_and_labels_at_a_threshold():
    assert convert(SCORED, "pair") == [Pair("p", "a", "b", "f:1")]
    assert convert(SCORED, "pair", gap=3.9) == [Pair("p", "a", "b", "f:1")]
    assert [row.label for row in convert(SCORED, "labelled", threshold=5.0)] == [1, 0, 1, 1]
    with pytest.raises(MeetjaxError, match="a prompt whose scores are more than 4 apart"):
        convert(SCORED, "pair", gap=4.0)
    with pytest.raises(MeetjaxError, match=r"data\.threshold; expected the score from which"):
        convert(SCORED, "labelled")
    with pytest.raises(MeetjaxError, match=r"data\.threshold; expected a score that splits the answers, which score 3 to 7; found 8"):
        convert(SCORED, "labelled", threshold=8.0)


def test_scores_without_spread_are_refused():
    with pytest.raises(MeetjaxError, match="more than 0 apart"):
        convert([Scored("p", "a", 1.0, "f:1"), Scored("p", "b", 1.0, "f:2")], "pair")


def test_impossible_conversions_name_the_possible_ones():
    with pytest.raises(MeetjaxError, match="data form; expected completion, which completion records can become; found pair"):
        convert([Completion("p", "a", "f:1")], "pair")
    with pytest.raises(MeetjaxError, match="completion or edited or labelled or pair, which pair records can become; found scored"):
        convert(PAIRS, "scored")
    with pytest.raises(MeetjaxError, match="records of one form; found completion and pair"):
        convert([*PAIRS, Completion("p", "a", "f:1")], "pair")


def test_goal_conditioned_laws():
    """2N out of N; each pair once in each order; both goals occur; stripping goals and reversed rows gives back the input."""
    pairs = [("p", "a", 8.0, "b", 3.0), ((Message("system", "Be kind."), Message("user", "q")), "c", 9.0, "d", 1.0)]
    scored = [Scored(p, y, r, f"f:{i}") for i, (p, *sides) in enumerate(pairs) for y, r in (sides[:2], sides[2:])]
    made = goal_conditioned(scored, "Score: {:g}".format)
    assert [(pair.chosen, pair.rejected) for pair in made] == [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]
    assert [made[0].prompt, made[1].prompt] == ["Score: 8\n\np", "Score: 3\n\np"]
    assert made[2].prompt == (Message("system", "Score: 9\n\nBe kind."), Message("user", "q"))
    talk = goal_conditioned([Scored((Message("user", "q"),), y, r, "f:1") for y, r in (("a", 2.0), ("b", 1.0))], "Score: {:g}".format)
    assert talk[0].prompt == (Message("system", "Score: 2"), Message("user", "q"))
    with pytest.raises(MeetjaxError, match="with a goal"):
        goal_conditioned(scored[:1], str)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "form", "records"),
    [
        ({"prompt": "p", "completion": "a", "label": True}, "labelled", [("p", "a", 1)]),
        ({"prompt": "p", "completion": "a", "label": 3}, "labelled", [("p", "a", 3)]),
        ({"prompt": "p", "completion": "a", "score": 4}, "scored", [("p", "a", 4.0)]),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 3},
            "scored",
            [("p", "a", 8.5), ("p", "b", 3.0)],
        ),
    ],
)
def test_labelled_and_scored_layouts(tmp_path, row, form, records):
    path = write(tmp_path / "rows.jsonl", [row])
    kind = Labelled if form == "labelled" else Scored
    assert read_records(path, form)[0] == [kind(*record, f"{path}:1") for record in records]
    assert form_of(path) == ("pair" if "rejected" in row else form)


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        (
            {"prompt": "p", "completion": "a", "label": "good"},
            "labelled",
            r"rows.jsonl:1: field 'label'; expected true, false or a class number",
        ),
        ({"prompt": "p", "completion": "a", "label": -1}, "labelled", "field 'label'.*found -1"),
        ({"prompt": "p", "completion": "a"}, "labelled", "missing column; expected label"),
        ({"prompt": "p", "completion": "a", "score": None}, "scored", "field 'score'; expected a finite number; found None"),
        ({"prompt": "p", "completion": "a", "score": True}, "scored", "field 'score'.*found True"),
        (SIDES, "scored", "missing column; expected score_chosen"),
    ],
)
def test_broken_labels_and_scores_are_named(tmp_path, row, form, message):
    with pytest.raises(MeetjaxError, match=message):
        read_records(write(tmp_path / "rows.jsonl", [row]), form)
