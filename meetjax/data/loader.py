"""From token rows to batches of a few fixed lengths, in a seeded order that can be resumed exactly, for one host of many."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from meetjax.data.audit import Audit
from meetjax.data.tokenize import Rows, answer_ids, distinct_tokens, laid_lengths
from meetjax.errors import MeetjaxError
from meetjax.types import Batch

Buckets = tuple[int, ...]
"""Ascending padded lengths in tokens, one compiled program each."""

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # padding a batch takes microseconds; more would only hold memory


class Plan(NamedTuple):
    """One global batch: padded length, rows int64[batch_size], and how many of them count (the rest repeat rows to fill it)."""

    length: int
    rows: Int[np.ndarray, " B"]
    real: int


def choose_buckets(*tables: Rows, count: int = 12, multiple: int = 16) -> Buckets:
    """The at most `count` padded lengths, multiples of `multiple`, that hold all rows of the tables with the least padding.

    Exact: best[k][j], the least padded tokens of rows up to the j-th length in k buckets, is min over i < j of
    best[k - 1][i] + length_j * (rows of lengths i + 1 to j). Raises MeetjaxError for no rows or no buckets.
    """
    if count < 1 or multiple < 1 or not any(map(len, tables)):
        raise MeetjaxError("buckets", expected="rows, count >= 1 and multiple >= 1", found=(sum(map(len, tables)), count, multiple))
    longest = np.concatenate([laid_lengths(rows).max(1) for rows in tables])
    lengths, tallies = np.unique(-(-longest // multiple) * multiple, return_counts=True)
    below = np.concatenate([[0], np.cumsum(tallies)])
    cost = np.where(np.tri(len(lengths), len(below), 0, bool), lengths[:, None] * (below[1:, None] - below[None]), np.inf)
    best, cuts = np.concatenate([[0.0], np.full(len(lengths), np.inf)]), []
    for _ in range(min(count, len(lengths))):
        total = best[None] + cost
        cuts.append(total.argmin(1))
        best = np.concatenate([[0.0], total.min(1)])
    chosen, end = [], len(lengths)
    for cut in reversed(cuts):
        if end:
            chosen.append(int(lengths[end - 1]))
            end = int(cut[end - 1])
    return tuple(reversed(chosen))


def make_batches(rows: Rows, batch_size: int, buckets: Buckets, seed: int) -> list[Plan]:
    """Puts every row into exactly one batch of rows of similar length; the composition depends on `seed` alone.

    A row's length is that of its longest row in a batch. What is left over in a bucket moves up to the next one, and the last
    leftover is filled with repeats. Each batch is padded to the smallest bucket that holds its longest row.
    Raises MeetjaxError for no rows, a bad batch size, unordered buckets, a seed outside [0, 2^32) and a row longer than the last bucket.
    """
    _check_seed(seed)
    return _compose(rows, batch_size, buckets, np.random.default_rng(seed).permutation(len(rows)))


def eval_batches(
    rows: Rows, batch_size: int, buckets: Buckets, host: int = 0, hosts: int = 1
) -> Iterator[tuple[Batch, Int[np.ndarray, " b"]]]:
    """One pass in a fixed order, shortest rows first, every row exactly once: where `weights` is 1. Yields what `loader` yields."""
    _check_hosts(batch_size, host, hosts)
    plans = _compose(rows, batch_size, buckets, np.argsort(laid_lengths(rows).max(1), kind="stable"))
    return (pad_batch(rows, plan, host, hosts) for plan in plans)


def loader(
    rows: Rows, batch_size: int, buckets: Buckets, seed: int, host: int = 0, hosts: int = 1, state: dict[str, Any] | None = None
) -> Loader:
    """An endless iterator over (batch, row indices) with exact resume.

    Composition as in `make_batches`; the order of the batches is shuffled anew each epoch. `batch_size` is global: host h
    of H gets rows [h B/H, (h+1) B/H) of every batch, so all hosts see the same length at the same step. `batch` holds numpy
    arrays [B/H, K, T]; the indices int64[B/H] point into `rows` (filled-up rows too: their weight is 0). `state`
    is what `get_state` gave, also on another number of hosts. Raises MeetjaxError like `make_batches`, when `batch_size`
    does not divide by `hosts`, and for a state that belongs to other data, batch size, buckets or seed.
    """
    _check_hosts(batch_size, host, hosts)
    plans = make_batches(rows, batch_size, buckets, seed)
    data = grain.MapDataset.source(plans).seed(seed).shuffle().repeat().map(lambda plan: pad_batch(rows, plan, host, hosts))
    made = Loader(iter(data.to_iter_dataset(READ)), len(plans), _plan_key(rows, plans, seed))
    if state is not None:
        made.set_state(state)
    return made


class Loader:
    """The iterator that `loader` makes; `batches_per_epoch` is its number of distinct batches."""

    def __init__(self, batches: Any, batches_per_epoch: int, key: str):
        self._batches = batches
        self._key = key
        self.batches_per_epoch = batches_per_epoch

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, Int[np.ndarray, " b"]]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: two JSON values, the index of the next batch and a key of the data and its order."""
        return {"next_index": int(self._batches.get_state()["next_index"]), "key": self._key}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a state; raises MeetjaxError when it is malformed or belongs to another order of batches."""
        index = state.get("next_index") if isinstance(state, dict) else None
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise MeetjaxError("loader state", expected="{'next_index': a number >= 0, 'key': ...}", found=state)
        if state.get("key") != self._key:
            raise MeetjaxError(
                "loader state: key",
                expected=self._key,
                found=state.get("key"),
                fix="resume with the data, batch size, buckets and seed of the run that saved it",
            )
        self._batches.set_state({"next_index": index})


def pad_batch(rows: Rows, plan: Plan, host: int = 0, hosts: int = 1) -> tuple[Batch, Int[np.ndarray, " b"]]:
    """This host's part of a planned batch, right-padded with 0 (masks come from lengths, so the value never matters)."""
    share = len(plan.rows) // hosts
    mine = slice(host * share, (host + 1) * share)
    chosen = plan.rows[mine]
    answers = rows.starts.shape[1]
    together = rows.shared_prompt and answers > 1
    begins = np.zeros((share, answers), np.int32)  # where the answer's text would begin, were its common part there
    common = rows.common[chosen]
    if together:
        begins[:, 1:] = np.cumsum(rows.lengths[chosen] - common[:, None], axis=1)[:, :-1]
    tokens = np.zeros((share, 1 if together else answers, plan.length), np.int32)
    token_weights = None if rows.token_weights is None else np.zeros(tokens.shape, np.float32)
    for b, n in enumerate(chosen):
        for c in range(answers):
            skip = common[b] if together and c else 0
            place = b, 0 if together else c, slice(begins[b, c] + skip, begins[b, c] + rows.lengths[n, c])
            tokens[place] = answer_ids(rows, n, c)[skip:]
            if token_weights is not None and rows.token_weights is not None:
                token_weights[place] = rows.token_weights[rows.offsets[n, c] :][: rows.lengths[n, c]][skip:]
    weights = (np.arange(len(plan.rows)) < plan.real).astype(np.float32)[mine]
    starts, ends = (begins + places[chosen] for places in (rows.starts, rows.lengths))
    classes, gates = (None if column is None else column[chosen] for column in (rows.classes, rows.gates))
    return Batch(
        tokens, starts, ends, weights, gates, common=common if together else None, classes=classes, token_weights=token_weights
    ), chosen


def padding_audit(rows: Rows, plans: list[Plan]) -> Audit:
    """Token counts of one epoch: padded (what is computed), real, and distinct (shared prompts once); and the batches."""
    padded = sum(len(plan.rows) * laid_lengths(rows).shape[1] * plan.length for plan in plans)
    stats = {"batches": len(plans), "padded tokens": padded, "tokens": int(rows.lengths.sum()), "distinct tokens": distinct_tokens(rows)}
    return Audit(len(rows), stats=stats)


def _compose(rows: Rows, batch_size: int, buckets: Buckets, order: Int[np.ndarray, " N"]) -> list[Plan]:
    if len(rows) == 0:
        raise MeetjaxError("batches: rows", expected="at least one", found="none")
    if batch_size < 1:
        raise MeetjaxError("batches: batch_size", expected="at least 1", found=batch_size)
    if not buckets or buckets[0] < 1 or any(a >= b for a, b in pairwise(buckets)):
        raise MeetjaxError("batches: buckets", expected="ascending positive lengths", found=tuple(buckets))
    longest = laid_lengths(rows).max(1)
    if longest.max() > buckets[-1]:
        raise MeetjaxError(
            f"batches: row {int(longest.argmax())}",
            expected=f"at most {buckets[-1]} tokens, the last bucket",
            found=int(longest.max()),
            fix="add a longer bucket, or let them be chosen",
        )
    bucket = np.searchsorted(buckets, longest[order])
    plans: list[Plan] = []
    left = order[:0]
    for k in range(len(buckets)):
        pool = np.concatenate([left, order[bucket == k]])  # leftovers first: they move up once, not to the top
        full = len(pool) - len(pool) % batch_size
        plans += [_plan(pool[i : i + batch_size], batch_size, longest, buckets) for i in range(0, full, batch_size)]
        left = pool[full:]
    if len(left):
        plans.append(_plan(left, batch_size, longest, buckets))
    return plans


def _plan(chosen: Int[np.ndarray, " n"], batch_size: int, longest: Int[np.ndarray, " N"], buckets: Buckets) -> Plan:
    length = buckets[int(np.searchsorted(buckets, longest[chosen].max()))]
    return Plan(length, np.resize(chosen, batch_size).astype(np.int64), len(chosen))


def _plan_key(rows: Rows, plans: list[Plan], seed: int) -> str:
    """A key of everything that decides which rows come when; the number of hosts does not."""
    digest = hashlib.sha256(f"{seed}:{''.join(rows.hashes)}".encode())
    for column in (rows.classes, rows.gates, rows.token_weights):
        digest.update(b"" if column is None else column.tobytes())
    for plan in plans:
        digest.update(np.array([plan.length, plan.real, *plan.rows], "<i8").tobytes())
    return digest.hexdigest()[:16]


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise MeetjaxError("batches: seed", expected="a number from 0 to 2^32 - 1", found=seed)


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
    if hosts < 1 or not 0 <= host < hosts:
        raise MeetjaxError("batches: host", expected="0 <= host < hosts", found=f"host {host} of {hosts}")
    if batch_size % hosts:
        raise MeetjaxError("batches: batch_size", expected=f"a multiple of the {hosts} hosts", found=batch_size)
