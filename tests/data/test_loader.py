"""Every row once an epoch, a few fixed shapes, equal shapes on all hosts, exact resume at every position."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meetjax.data.loader import choose_buckets, eval_batches, loader, make_batches, padding_audit
from meetjax.data.tokenize import Rows, answer_ids, laid_lengths
from meetjax.errors import MeetjaxError

BUCKETS = (8, 16, 24)
FEW = settings(deadline=None, max_examples=30)
lengths_of = st.lists(st.integers(3, 24), min_size=1, max_size=30)


def make_rows(longest, answers=2, shared_prompt=False):
    """Rows whose first answer has the given lengths; no id is 0, so that padding shows. Answers of 2 tokens."""
    lengths = np.array([[max(3, n - c) for c in range(answers)] for n in longest], np.int32)
    ends = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape)
    ids, common = np.arange(1, lengths.sum() + 1, dtype=np.int32), (lengths - 2).min(1)
    for first, *others in zip(common, *(ends - lengths).T, strict=True):
        for begin in others[1:]:
            ids[begin : begin + first] = ids[others[0] : others[0] + first]
    return Rows(
        ids=ids,
        offsets=ends - lengths,
        starts=lengths - 2,
        lengths=lengths,
        common=common,
        hashes=np.array([f"{n:016x}" for n in range(len(longest))]),
        records=np.arange(len(longest), dtype=np.int32),
        shared_prompt=shared_prompt,
    )


def real_rows(items):
    return sorted(np.concatenate([index[batch.weights > 0] for batch, index in items]).tolist())


def check_batch(rows, batch, index):
    assert batch.tokens.dtype == batch.starts.dtype == batch.ends.dtype == np.int32 and batch.weights.dtype == np.float32
    assert batch.gates is None and batch.ref_logps is None
    assert batch.tokens.shape[2] in BUCKETS
    answers = rows.starts.shape[1]
    together = rows.shared_prompt and answers > 1
    assert batch.tokens.shape[1] == (1 if together else answers)
    assert np.array_equal(batch.ends - batch.starts, (rows.lengths - rows.starts)[index])
    for b, n in enumerate(index):
        for c in range(answers):
            ids, row, common = answer_ids(rows, n, c), batch.tokens[b, 0 if together else c], rows.common[n] if together else 0
            begin = batch.ends[b, c - 1] if together and c else common
            assert np.array_equal([*row[:common], *row[begin : batch.ends[b, c]]], ids)
            assert batch.starts[b, c] - begin == rows.starts[n, c] - common
            assert not (row[batch.ends[b, c] :].any() and (c == answers - 1 or not together))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_chosen_buckets_pad_least(longest, count, multiple, shared_prompt):
    """Against every choice of lengths."""
    rows = make_rows(longest, shared_prompt=shared_prompt)
    lengths = laid_lengths(rows).max(1)
    rounded = sorted({-(-n // multiple) * multiple for n in lengths.tolist()})

    def padded(buckets):
        return sum(min(b for b in buckets if b >= n) for n in lengths)

    found = choose_buckets(rows, count=count, multiple=multiple)
    choices = [(*some, rounded[-1]) for k in range(count) for some in itertools.combinations(rounded[:-1], k)]
    assert list(found) == sorted(set(found)) and 1 <= len(found) <= count and set(found) <= set(rounded)
    assert padded(found) == min(map(padded, choices))


def test_chosen_buckets_hold_all_tables():
    assert choose_buckets(make_rows([5, 9]), make_rows([70]), count=2, multiple=8) == (16, 72)


@FEW
@given(lengths_of, st.integers(1, 9), st.integers(0, 3))
def test_plans_hold_every_row_once_and_only_the_last_is_filled(longest, batch_size, seed):
    rows = make_rows(longest)
    plans = make_batches(rows, batch_size, BUCKETS, seed)
    assert sorted(n for plan in plans for n in plan.rows[: plan.real]) == list(range(len(rows)))
    assert all(plan.real == batch_size for plan in plans[:-1]) and 1 <= plans[-1].real <= batch_size
    for plan in plans:
        tallest = rows.lengths[plan.rows].max()
        assert len(plan.rows) == batch_size and plan.length == min(b for b in BUCKETS if b >= tallest)
        assert set(plan.rows) == set(plan.rows[: plan.real])
    again = make_batches(rows, batch_size, BUCKETS, seed)
    assert all(a.length == b.length and np.array_equal(a.rows, b.rows) for a, b in zip(plans, again, strict=True))
    padded = sum(plan.length * batch_size * 2 for plan in plans)
    assert padding_audit(rows, plans).stats["padded tokens"] == padded >= rows.lengths.sum()


def test_rows_of_one_bucket_stay_together_but_for_the_leftovers():
    plans = make_batches(make_rows([5] * 9 + [14] * 9 + [20] * 6), 4, BUCKETS, seed=0)
    assert [plan.length for plan in plans] == [8, 8, 16, 16, 24, 24]


def test_the_seed_changes_the_composition():
    rows = make_rows([5] * 40)
    composed = [{tuple(sorted(plan.rows)) for plan in make_batches(rows, 4, BUCKETS, seed)} for seed in (0, 1)]
    assert composed[0] != composed[1]


@FEW
@given(lengths_of, st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_eval_covers_every_row_once_in_a_fixed_order(longest, batch_size, answers, shared_prompt):
    rows = make_rows([min(n, 24 - 2 * answers) for n in longest], answers, shared_prompt)
    items = list(eval_batches(rows, batch_size, BUCKETS))
    assert real_rows(items) == list(range(len(rows)))
    for batch, index in items:
        check_batch(rows, batch, index)
    again = list(eval_batches(rows, batch_size, BUCKETS))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(items, again, strict=True))


@settings(deadline=None, max_examples=10)
@given(lengths_of, st.integers(1, 6), st.integers(0, 3))
def test_every_epoch_holds_every_row_once(longest, batch_size, seed):
    rows = make_rows(longest)
    batches = loader(rows, batch_size, BUCKETS, seed)
    for _ in range(2):
        items = [next(batches) for _ in range(batches.batches_per_epoch)]
        assert real_rows(items) == list(range(len(rows)))
        for batch, index in items:
            check_batch(rows, batch, index)


def test_epochs_come_in_different_orders():
    batches = loader(make_rows([5, 14, 20] * 12), 3, BUCKETS, seed=0)
    epochs = [[tuple(next(batches)[1]) for _ in range(batches.batches_per_epoch)] for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_resume_is_exact_at_every_position():
    rows = make_rows([5, 14, 20, 7, 9, 23, 11] * 3)
    whole = loader(rows, 4, BUCKETS, seed=3)
    steps = 3 * whole.batches_per_epoch
    states, items = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(whole.get_state())))
        items.append(next(whole))
    assert len(json.dumps(states[-1])) < 100
    for position, state in enumerate(states):
        resumed = loader(rows, 4, BUCKETS, seed=3, state=state)
        assert resumed.get_state() == state
        for (batch, index), (old, old_index) in zip((next(resumed) for _ in range(4)), items[position : position + 4], strict=False):
            assert np.array_equal(index, old_index) and np.array_equal(batch.tokens, old.tokens)
            assert np.array_equal(batch.weights, old.weights)
    whole.set_state(states[2])
    assert np.array_equal(next(whole)[1], items[2][1])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(hosts):
    rows = make_rows([5, 14, 20, 7, 9, 21, 11] * 3, shared_prompt=True)
    whole = loader(rows, 8, BUCKETS, seed=1)
    parts = [loader(rows, 8, BUCKETS, seed=1, host=h, hosts=hosts) for h in range(hosts)]
    for _ in range(2 * whole.batches_per_epoch):
        batch, index = next(whole)
        shares = [next(part) for part in parts]
        for field in ("tokens", "starts", "ends", "weights", "common"):
            assert np.array_equal(np.concatenate([getattr(share, field) for share, _ in shares]), getattr(batch, field))
        assert np.array_equal(np.concatenate([i for _, i in shares]), index)
    elsewhere = loader(rows, 8, BUCKETS, seed=1, state=parts[0].get_state())
    assert np.array_equal(next(elsewhere)[1], next(whole)[1]), "a state must move between numbers of hosts"
    for items in zip(eval_batches(rows, 8, BUCKETS), *(eval_batches(rows, 8, BUCKETS, h, hosts) for h in range(hosts)), strict=True):
        assert np.array_equal(np.concatenate([i for _, i in items[1:]]), items[0][1])


def test_bad_arguments():
    rows = make_rows([5, 20])
    for call, message in [
        (lambda: loader(rows, 4, BUCKETS, 0, host=0, hosts=3), "multiple of the 3 hosts; found 4"),
        (lambda: loader(rows, 4, BUCKETS, 0, host=2, hosts=2), "found host 2 of 2"),
        (lambda: eval_batches(rows, 3, BUCKETS, 0, 2), "multiple of the 2 hosts"),
        (lambda: loader(rows, 0, BUCKETS, 0), "batch_size"),
        (lambda: loader(rows, 4, (16, 8), 0), "ascending"),
        (lambda: loader(rows, 4, (), 0), "ascending"),
        (lambda: loader(rows, 4, (8, 16), 0), "row 1; expected at most 16 tokens, the last bucket; found 20"),
        (lambda: loader(rows, 4, BUCKETS, -1), "seed"),
        (lambda: loader(rows, 4, BUCKETS, 2**32), "seed"),
        (lambda: make_batches(empty_rows(), 4, BUCKETS, 0), "at least one"),
        (lambda: choose_buckets(rows, count=0), "count >= 1"),
        (lambda: choose_buckets(), "buckets; expected rows"),
    ]:
        with pytest.raises(MeetjaxError, match=message):
            call()


def empty_rows():
    rows = make_rows([5])
    return Rows(*(getattr(rows, field)[:0] for field in ("ids", "offsets", "starts", "lengths", "common", "hashes", "records")))


def test_a_state_of_another_run_is_refused():
    rows = make_rows([5, 14, 20, 7, 9, 23, 11])
    state = loader(rows, 2, BUCKETS, seed=0).get_state()
    changed = dataclasses.replace(rows, hashes=rows.hashes[::-1])
    for other in [(changed, 2, BUCKETS, 0), (rows, 1, BUCKETS, 0), (rows, 2, (8, 12, 24), 0), (rows, 2, BUCKETS, 1)]:
        with pytest.raises(MeetjaxError, match=r"loader state: key.*resume with the data"):
            loader(*other, state=state)
    for broken in ({}, {"next_index": -1}, {"next_index": "3"}, 7, {"next_index": True}):
        with pytest.raises(MeetjaxError, match="loader state"):
            loader(rows, 2, BUCKETS, seed=0, state=broken)
