"""The self-test on a tiny model: all laws hold on a sound model, and a broken one is found out."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

import meetjax.selftest as selftest_module
from meetjax.data.records import read_records
from meetjax.selftest import run
from tests.conftest import write_pairs


@pytest.fixture(autouse=True)
def short_texts(tmp_path, monkeypatch):
    """The tiny tokenizer spells the built-in set letter by letter, past the tiny model's positions."""
    file = write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(selftest_module, "read_records", lambda _, form, limit: read_records(file, form, limit=limit))


def test_laws_hold_on_a_sound_model(model_folder):
    printed = io.StringIO()
    assert run(str(model_folder), Console(file=printed, width=200)), printed.getvalue()
    lines = printed.getvalue().splitlines()
    assert sum(line.startswith("pass") for line in lines) == len(lines) - 1 >= 14 and "all laws hold" in lines[-1]


def test_a_broken_law_is_told(model_folder, monkeypatch):
    """Scores that depend on a row's place in its batch."""
    sound = selftest_module.logps

    def broken(config, params, adapters, batch):
        scores = np.asarray(sound(config, params, adapters, batch))
        return scores * (1 + 0.01 * np.arange(len(scores))[:, None]).astype(np.float32)

    monkeypatch.setattr(selftest_module, "logps", broken)
    printed = io.StringIO()
    assert not run(str(model_folder), Console(file=printed, width=200))
    assert "FAIL  batch order changes nothing" in printed.getvalue() and "some laws FAIL" in printed.getvalue()
