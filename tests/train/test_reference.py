"""Reference scores: the base's own, remembered between runs, and never those of another base, row or shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import meetjax.train.reference as reference_module
from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.records import read_records
from meetjax.data.tokenize import tokenize_records
from meetjax.errors import MeetjaxError
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.train.reference import Reference
from tests.conftest import write_pairs


@pytest.fixture(scope="module")
def batches(model, tmp_path_factory):
    records, _ = read_records(write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"), "pair")
    rows, _ = tokenize_records(records, model.tokenizer, 64)
    return rows, list(eval_batches(rows, 4, choose_buckets(rows, count=2)))


@pytest.fixture
def forwards(monkeypatch):
    """Counts the batches that meet the model."""
    seen = []

    def counted(config, params, adapters, batch):
        seen.append(batch)
        return compiled_answer_logps(config, params, adapters, batch)

    monkeypatch.setattr(reference_module, "compiled_answer_logps", counted)
    return seen


def test_each_batch_meets_the_model_once_for_all_runs(model, batches, forwards, tmp_path):
    """The second run reads what the first has left, to the bit."""
    rows, items = batches
    file, runs = tmp_path / "cache" / "reference.sqlite", []
    for _ in range(2):
        reference = Reference(model.config, model.params, file=file, fingerprint=model.fingerprint)
        runs.append([reference.logps(batch, rows, chosen) for batch, chosen in (*items, *items)])
    assert len(forwards) == len(items) > 1
    for (batch, _), first, second in zip(items, runs[0], runs[1], strict=False):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, compiled_answer_logps(model.config, model.params, None, batch))


def test_what_a_score_depends_on_is_in_its_key(model, batches, forwards, tmp_path, monkeypatch):
    """Another base, dtype, row, shape, layout or code is another entry."""
    rows, ((batch, chosen), *_) = batches
    config, file = model.config, tmp_path / "reference.sqlite"
    Reference(config, model.params, file=file, fingerprint="a").logps(batch, rows, chosen)
    Reference(config, model.params, file=file, fingerprint="b").logps(batch, rows, chosen)
    Reference(dataclasses.replace(config, dtype="bfloat16"), model.params, file=file, fingerprint="a").logps(batch, rows, chosen)
    Reference(config, model.params, file=file, fingerprint="a").logps(batch, dataclasses.replace(rows, hashes=rows.hashes[::-1]), chosen)
    wide = dataclasses.replace(batch, tokens=np.pad(batch.tokens, ((0, 0), (0, 0), (0, 8))))
    Reference(config, model.params, file=file, fingerprint="a").logps(wide, rows, chosen)
    monkeypatch.setattr(reference_module, "_code", lambda: "changed")
    Reference(config, model.params, file=file, fingerprint="a").logps(batch, rows, chosen)
    assert len(forwards) == 6


def test_a_file_that_is_no_cache_is_one_line(model, tmp_path):
    file = tmp_path / "reference.sqlite"
    file.write_text("not a database" * 100)
    with pytest.raises(MeetjaxError, match=r"reference\.sqlite; expected a cache of reference scores.*delete it or set MEETJAX_CACHE"):
        Reference(model.config, model.params, file=file, fingerprint="a")
    with pytest.raises(MeetjaxError, match="reference"):
        Reference(model.config, model.params, file=file / "reference.sqlite", fingerprint="a")
