"""A sweep: strengths as they are written, one batch, distances from the base, a table, a CSV and a figure."""

from __future__ import annotations

import csv
import io

import jax
import numpy as np
import pytest
from rich.console import Console

import meetjax.sweep as sweep_module
from meetjax.adapters.algebra import at_strength
from meetjax.adapters.io import save_adapters
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import generate_texts
from meetjax.objectives.logps import answer_states
from meetjax.sweep import parse_strengths, show, sweep_prompts, write
from tests.conftest import ROUNDING, quick_forward, random_bank, take

NEW = 8
STRENGTHS = (-1.0, 0.0, 0.5, 1.0)


@pytest.fixture(scope="module", params=["edit", "prompt"])
def swept(request, model):
    """(bank, points): by gates for an edit, by the logit dial for a soft prompt."""
    bank = take(random_bank(model.config, (request.param,)), 0)
    calls = []

    def once(*arguments, **options):
        calls.append(options["batch_size"])
        return generate_texts(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "generate_texts", once)
        patch.setattr(sweep_module, "forward", jax.jit(answer_states, static_argnums=0))
        points = sweep_prompts(model, bank, ["3 cat?", "hello"], STRENGTHS, NEW)
    assert calls == [8], "all strengths of all prompts in one batch"
    return bank, points


def test_answers_and_distances_are_those_of_each_strength(swept, model):
    """KL and log-ratio from whole softmaxes of `apply`, 0 where the strength is 0; and the answer is the greedy one of its strength."""
    bank, points = swept
    assert [(p.prompt, p.strength) for p in points] == [(prompt, s) for prompt in ("3 cat?", "hello") for s in STRENGTHS]
    for point in points:
        ids, first = np.array([*point.answer.prompt, *point.answer.ids], np.int32)[None], len(point.answer.prompt)
        gates, dial = at_strength(bank, point.strength)
        options = {} if dial is None else {"dial": np.array([dial], np.float32)}
        logits = [
            quick_forward(model.config, model.params, ids, bank, np.array([gates], np.float32), **options),
            quick_forward(model.config, model.params, ids),
        ]
        ours, base = (np.asarray(jax.nn.log_softmax(x[0, first - 1 : -1], axis=-1)) for x in logits)
        np.testing.assert_array_equal(ours.argmax(axis=1), point.answer.ids)
        kl = (np.exp(ours) * (ours - base)).sum(1).mean()
        ratio = np.take_along_axis(ours - base, ids[0, first:, None], axis=1).mean()
        np.testing.assert_allclose((point.kl, point.log_ratio), (kl, ratio), rtol=0, atol=10 * ROUNDING)
        assert (point.strength == 0) == (abs(point.kl) < 1e-6)


def test_table_csv_and_figure(swept, tmp_path):
    _, points = swept
    out = io.StringIO()
    show(points, Console(file=out, width=160))
    assert out.getvalue().count("log-ratio") == 2 and "█" * 12 in out.getvalue()
    write(points, tmp_path / "new" / "out")
    with open(tmp_path / "new" / "out" / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["strength"]) for row in rows] == [point.strength for point in points]
    assert [row["answer"] for row in rows] == [point.answer.text for point in points]
    assert [float(row["kl"]) for row in rows] == [point.kl for point in points]
    svg = (tmp_path / "new" / "out" / "sweep.svg").read_text()
    assert all(text in svg for text in ("answer length, tokens", "KL to the base", "log-ratio to the base"))
    (tmp_path / "file").write_text("")
    with pytest.raises(MeetjaxError, match="could not be written"):
        write(points, tmp_path / "file" / "out")


def test_strengths_are_read():
    assert parse_strengths("-1:2:0.25") == tuple(-1 + i / 4 for i in range(13))
    assert parse_strengths("0:1:0.1")[3:] == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_strengths("0,1.5,0,-2") == (0.0, 1.5, -2.0)
    assert parse_strengths("0.7") == (0.7,)
    for wrong in ("", "a", "0:1", "0:1:0", "1:0:0.5", "0:1:-1", "0:1:1e-9", "nan", "0:inf:1", "0:1:1:1"):
        with pytest.raises(MeetjaxError, match="first:last:step"):
            parse_strengths(wrong)


def test_what_one_batch_at_one_strength_cannot_be_is_refused(model):
    bank = random_bank(model.config, ("edit",), entries=(0,))
    with pytest.raises(MeetjaxError, match="gate columns of the adapter; expected one, for one strength to set; found 2"):
        sweep_prompts(model, random_bank(model.config, ("lora",)), ["hello"], (0.0, 1.0), 4)
    with pytest.raises(MeetjaxError, match=r"prompts x strengths; expected at most 128; found 129"):
        sweep_prompts(model, bank, ["a"] * 43, (0.0, 1.0, 2.0), NEW)


def test_sweep_as_a_user_runs_it(command, model, model_folder, tmp_path):
    bank = take(random_bank(model.config, ("edit",)), 0)
    folder = save_adapters(tmp_path / "adapter", bank, base="tiny", fingerprint=model.fingerprint)
    arguments = ("sweep", "--model", model_folder, "--adapter", folder, "--prompt", "3 cat?", "--max-new-tokens", 2)
    done = command(*arguments, "--strengths", "-1:1:1", "--out", tmp_path / "out")
    assert (done.status, done.err) == (0, "")
    assert f"wrote {tmp_path / 'out'}" in done.out
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) > 3
