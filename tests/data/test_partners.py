"""Partners of KTO's rows: another prompt's answer behind the row's own prompt, the same one every time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.partners import with_partners
from meetjax.data.records import Labelled
from meetjax.data.tokenize import answer_ids, tokenize_records
from meetjax.errors import MeetjaxError

LONG = 64
texts = st.lists(
    st.tuples(st.sampled_from(["the cat", "the mat", "a bed"]), st.sampled_from(["sat", "on the mat", "is"])), min_size=2, max_size=9
)


def tokenized(tokenizer, rows):
    return tokenize_records([Labelled(f"{p}|", a, i % 2, f"f:{i}") for i, (p, a) in enumerate(rows)], tokenizer, LONG)[0]


@settings(deadline=None, max_examples=30)
@given(texts, st.integers(0, 3))
def test_a_partner_is_an_answer_to_another_prompt(plain_tokenizer, texts, seed):
    rows = tokenized(plain_tokenizer, texts)
    prompts = {p for p, _ in texts}
    if len(prompts) < 2:
        with pytest.raises(MeetjaxError, match="at least two different prompts; found 1"):
            with_partners(rows, LONG, seed)
        return
    made = with_partners(rows, LONG, seed)
    assert np.array_equal(made.classes, [i % 2 for i in range(len(texts))]) and made.starts.shape == (len(texts), 2)
    for n, (prompt, _) in enumerate(texts):
        start = rows.starts[n, 0]
        assert np.array_equal(answer_ids(made, n, 0), answer_ids(rows, n, 0))
        assert np.array_equal(answer_ids(made, n, 1)[:start], answer_ids(rows, n, 0)[:start]) and made.common[n] == start
        borrowed = answer_ids(made, n, 1)[start:].tolist()
        others = [answer_ids(rows, m, 0)[rows.starts[m, 0] :].tolist() for m, (other, _) in enumerate(texts) if other != prompt]
        assert borrowed in others
    again = with_partners(rows, LONG, seed)
    assert np.array_equal(again.ids, made.ids) and np.array_equal(again.hashes, made.hashes)


def test_partners_are_laid_behind_the_shared_prompt_and_cut(plain_tokenizer):
    rows = tokenized(plain_tokenizer, [("the cat", "sat on the mat " * 4), ("a bed", "is")])
    short = with_partners(rows, max_length=12)
    assert short.lengths[1, 1] == 12 and short.lengths[0, 0] == rows.lengths[0, 0]
    ((batch, chosen),) = eval_batches(short, 2, choose_buckets(short))
    assert batch.tokens.shape[1] == 1 and batch.starts.shape == (2, 2)
    assert batch.classes.tolist() == rows.classes[chosen].tolist()
    with pytest.raises(MeetjaxError, match="rows of one answer; found 2"):
        with_partners(short, LONG)


def test_gates_and_classes_reach_the_batch(plain_tokenizer):
    rows = tokenized(plain_tokenizer, [("the cat", "sat"), ("a bed", "is"), ("the mat", "is")])
    gates = np.arange(6, dtype=np.float32).reshape(3, 2)
    for batch, chosen in eval_batches(dataclasses.replace(rows, gates=gates), 2, choose_buckets(rows)):
        np.testing.assert_array_equal(batch.gates, gates[chosen])
        np.testing.assert_array_equal(batch.classes, rows.classes[chosen])
