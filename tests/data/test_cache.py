"""Token rows are found again by content, and by nothing less."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from meetjax.data import cache
from meetjax.data.cache import cached_rows
from meetjax.data.records import Labelled, Message, Pair
from meetjax.data.tokenize import Rows
from meetjax.errors import MeetjaxError

RECORDS = [Pair((Message("user", f"say {n}"),), f"yes {n}", " " if n == 1 else f"no {n}", f"f:{n}") for n in range(4)]
LABELLED = [Labelled((Message("user", f"say {n}"),), f"yes {n}", n % 2, f"f:{n}") for n in range(4)]


@pytest.fixture
def tokenised(monkeypatch, tmp_path):
    """Numbers of records that were really tokenised."""
    calls, real = [], cache.tokenize_records

    def counted(records, *arguments, **more):
        calls.append(len(records))
        return real(records, *arguments, **more)

    monkeypatch.setenv("MEETJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LEAST", 2)
    monkeypatch.setattr(cache, "tokenize_records", counted)
    return calls


@pytest.mark.parametrize("records", [RECORDS, LABELLED], ids=["pairs", "labelled"])
def test_a_second_time_gives_the_same_without_tokenising(records, tokenizer, tokenised):
    (first, told), (second, again) = (cached_rows(records, tokenizer, 64) for _ in range(2))
    assert tokenised == [4] and told == again
    for field in dataclasses.fields(Rows):
        one, two = getattr(first, field.name), getattr(second, field.name)
        assert type(one) is type(two) and np.array_equal(one, two), field.name
        assert not isinstance(one, np.ndarray) or one.dtype == two.dtype


def test_whatever_rows_depend_on_makes_another_entry(tokenizer, bos_tokenizer, tokenised):
    cached_rows(RECORDS, tokenizer, 64)
    changed = [dataclasses.replace(RECORDS[0], chosen="yes!"), *RECORDS[1:]]
    moved = [dataclasses.replace(RECORDS[0], where="g:0"), *RECORDS[1:]]
    for records, *settings in (
        (changed, tokenizer, 64),
        (moved, tokenizer, 64),
        (RECORDS[::-1], tokenizer, 64),
        (RECORDS, tokenizer, 63),
        (RECORDS, tokenizer, 64, "chat"),
        (RECORDS, tokenizer, 64, "auto", ("m",)),
        ([dataclasses.replace(record, prompt="say") for record in RECORDS], bos_tokenizer, 64),
    ):
        before = len(tokenised)
        cached_rows(records, *settings)
        assert len(tokenised) == before + 1, settings[1:]


def test_few_records_are_not_kept(tokenizer, tokenised, tmp_path):
    for _ in range(2):
        cached_rows(RECORDS[:1], tokenizer, 64)
    assert tokenised == [1, 1] and not (tmp_path / "rows").exists()


def test_bad_records_are_no_fault_of_the_cache(tokenizer, tokenised):
    with pytest.raises(MeetjaxError, match="tokenize: markers; expected one for each class"):
        cached_rows(RECORDS, tokenizer, 64, markers=("a", "b"))


def test_a_broken_entry_is_named(tokenizer, tokenised, tmp_path):
    cached_rows(RECORDS, tokenizer, 64)
    (file,) = (tmp_path / "rows").iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(MeetjaxError, match=rf"^{file}; expected token rows .* delete it, or set MEETJAX_CACHE"):
        cached_rows(RECORDS, tokenizer, 64)
