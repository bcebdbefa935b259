"""Counts add up, the rendering shows them, and the split never lets a prompt be on both sides."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from meetjax.data.audit import Audit, Finding, merge, render_table, split_rows, then
from meetjax.data.records import Completion, Pair
from meetjax.errors import MeetjaxError

READ = Audit(10, {"identical": Finding(2, "a:3")}, {"odd": Finding(1, "a:4")}, {"tokens": 100})
TOKENISED = Audit(8, {"too long": Finding(1, "a:9"), "identical": Finding(1, "a:1")}, {}, {"tokens": 5})


def test_steps_keep_the_last_count_and_sources_add_up():
    both = {"identical": Finding(3, "a:3"), "too long": Finding(1, "a:9")}
    assert then(READ, TOKENISED) == Audit(8, both, READ.noted, {"tokens": 105})
    assert merge(READ, TOKENISED) == Audit(18, both, READ.noted, {"tokens": 105})


def test_rendering_shows_every_number():
    audit = then(READ, TOKENISED)
    table = io.StringIO()
    Console(file=table, width=100).print(render_table(audit))
    for shown in ("kept", "8", "left out: identical", "a:3", "left out: too long", "a:9", "noted: odd", "tokens", "105"):
        assert shown in table.getvalue()


def make_records(prompts):
    return [Completion(f"p{p}", f"answer {i}", f"f:{i}") for i, p in enumerate(prompts)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.data())
def test_split_shares_no_prompt_and_loses_no_row(prompts, data):
    held_out = data.draw(st.integers(1, len(prompts) - 1))
    seed = data.draw(st.integers(0, 5))
    records = make_records(prompts)
    order = np.random.default_rng(seed).permutation(len(records))
    last = [records[i] for i in order[len(records) - held_out :]]
    expected = [records[i] for i in order[: len(records) - held_out] if records[i].prompt not in {r.prompt for r in last}]
    if not expected:
        with pytest.raises(MeetjaxError, match="training part"):
            split_rows(records, held_out, seed)
        return
    train, held, audit = split_rows(records, held_out, seed)
    assert (train, held) == (expected, last)
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    removed = sum(finding.count for finding in audit.excluded.values())
    assert len(train) + len(held) + removed == len(records) and audit.kept == len(train)
    train, all_held, audit = split_rows(records, held_out, seed, together=True)
    assert train == expected and all_held[:held_out] == held and len(all_held) == len(held) + removed and not audit.excluded


def test_pairs_and_demonstrations_split_alike():
    pairs = [Pair(f"p{i % 30}", "a", "b", f"f:{i}") for i in range(40)]
    demonstrations = [Completion(r.prompt, r.chosen, r.where) for r in pairs]
    places = [[[r.where for r in part] for part in split_rows(records, 8)[:2]] for records in (pairs, demonstrations)]
    assert places[0] == places[1]
    assert [r.where for r in split_rows(pairs, 8, seed=1)[1]] != places[0][1]


@pytest.mark.parametrize(("held_out", "seed", "message"), [(0, 0, "held_out"), (5, 0, "held_out"), (-1, 0, "held_out"), (1, -1, "seed")])
def test_impossible_splits(held_out, seed, message):
    with pytest.raises(MeetjaxError, match=message):
        split_rows(make_records(range(5)), held_out, seed)
