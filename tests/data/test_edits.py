"""Edit scripts: least, and what they leave is the same on both sides; weights reach the batch where their tokens are."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meetjax.data.convert import convert
from meetjax.data.edits import changed_tokens, with_edit_weights
from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.records import Completion, Edited, Pair, form_of, read_records
from meetjax.data.tokenize import answer_ids, tokenize_records
from meetjax.errors import MeetjaxError

ids = st.lists(st.integers(0, 3), max_size=9).map(lambda tokens: np.array(tokens, np.int32))


@functools.cache
def distance(a, b):
    """Levenshtein's, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@settings(deadline=None, max_examples=200)
@given(ids, ids)
def test_scripts_are_least_and_leave_the_same(original, revised):
    dropped, new = changed_tokens(original, revised)
    assert np.array_equal(original[~dropped], revised[~new])
    deletions = len(original) - len(revised)
    assert max(dropped.sum(), new.sum()) <= distance(tuple(original.tolist()), tuple(revised.tolist())) <= dropped.sum() + new.sum()
    assert dropped.sum() - new.sum() == deletions


@pytest.mark.parametrize(
    ("original", "revised", "dropped", "new"),
    [
        ([1, 2, 3, 4], [1, 9, 3, 4], [0, 1, 0, 0], [0, 1, 0, 0]),
        ([1, 2, 3], [1, 2, 7, 3], [0, 0, 0], [0, 0, 1, 0]),
        ([1, 2, 3], [1, 3], [0, 1, 0], [0, 0]),
        ([], [5], [], [1]),
        ([1, 2], [1, 2], [0, 0], [0, 0]),
        ([1, 1, 1], [1, 1], [0, 0, 1], [0, 0]),
    ],
)
def test_scripts_by_hand(original, revised, dropped, new):
    found = changed_tokens(np.array(original, np.int32), np.array(revised, np.int32))
    assert [side.astype(int).tolist() for side in found] == [dropped, new]


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_weights_stand_at_their_tokens(plain_tokenizer, shared_prompt):
    """1 on new tokens of the revision and its EOS, -1 on dropped ones of the original, 0 elsewhere, its EOS among it."""
    records = [Edited("the cat|", "sat on the mat", "sat on a mat", "f:1"), Edited("a bed|", "is", "is", "f:2")]
    rows = with_edit_weights(tokenize_records(records, plain_tokenizer, 64)[0])
    rows = dataclasses.replace(rows, shared_prompt=shared_prompt)
    ((batch, chosen),) = eval_batches(rows, 2, choose_buckets(rows))
    assert batch.token_weights.shape == batch.tokens.shape
    for b, n in enumerate(chosen):
        row = [0, 0] if shared_prompt else [0, 1]
        revised, original = (answer_ids(rows, n, c)[rows.starts[n, c] :] for c in range(2))
        dropped, new = changed_tokens(original[:-1], revised[:-1])
        for c, expected in enumerate(([*new.astype(int), 1], [*-dropped.astype(int), 0])):
            found = batch.token_weights[b, row[c], batch.starts[b, c] : batch.ends[b, c]]
            np.testing.assert_array_equal(found, expected)
        outside = np.abs(batch.token_weights[b]).sum() - sum(
            np.abs(batch.token_weights[b, row[c], batch.starts[b, c] : batch.ends[b, c]]).sum() for c in range(2)
        )
        assert outside == 0
    assert (batch.token_weights[list(chosen).index(1)] != 0).sum() == 1, "identical texts leave the EOS of the revision"


def test_edited_layout_and_conversions(tmp_path):
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "p", "original": "a", "revised": "b"}\n')
    records, _ = read_records(file, form_of(file))
    assert records == [Edited("p", "a", "b", f"{file}:1")]
    assert convert(records, "pair") == [Pair("p", "b", "a", f"{file}:1")]
    assert convert([Pair("p", "b", "a", "f:1")], "edited") == [Edited("p", "a", "b", "f:1")]
    with pytest.raises(MeetjaxError, match="missing column; expected original"):
        file.write_text('{"prompt": "p", "revised": "b"}\n')
        read_records(file, "edited")


def test_weights_need_two_answers(plain_tokenizer):
    rows, _ = tokenize_records([Completion("the cat|", "sat", "f:1")], plain_tokenizer, 64)
    with pytest.raises(MeetjaxError, match="a revised and an original answer; found 1 answers"):
        with_edit_weights(rows)
