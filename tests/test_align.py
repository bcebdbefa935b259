"""Recipes that train the base itself: what moves, what it is compared with, what is written, and what a broken run leaves."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import sqlite3

import jax
import numpy as np
import pytest
from rich.console import Console

import meetjax.train.fit as fit_module
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.io import load_adapters, read_manifest
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.tree import Bank, count_parameters
from meetjax.align import align
from meetjax.errors import MeetjaxError
from meetjax.evaluate.preference import row_logps
from meetjax.models.load import load
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.checkpoint import claimed
from meetjax.train.metrics import read_metrics
from meetjax.train.stage import Data, Optim, Recipe, Stage, Train
from meetjax.train.view import read_rows
from tests.conftest import write_pairs

SFT, DPO = Stage(("base",), Sft(), Optim(learning_rate=3e-3)), Stage(("base",), Dpo(), Optim(learning_rate=3e-3))
EDIT = Stage((EditSpec(),), Dpo(), Optim(learning_rate=1e-2))
STEPS = 4
SUMS = 1e-4
"""Nats, on sums over a dozen tokens: the same scores from a program compiled for other batches."""


@pytest.fixture(autouse=True, scope="module")
def surroundings(shared_training, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEETJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recipe(model_folder, tmp_path_factory):
    """Makes a recipe of these stages that writes into this folder."""
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")
    data = Data(path=str(pairs), held_out=6, max_length=64, buckets=(64,))

    def make(out, *stages, mesh=(1, 1, 1)):
        return Recipe("tiny", str(model_folder), data, Train(steps=STEPS, batch_size=4, save_every=2, mesh=mesh), stages, str(out))

    return make


def quiet():
    return Console(file=io.StringIO())


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def moved(left, right):
    return [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)]


def first_loss(out, stage):
    return read_metrics(out / f"stage-{stage}")[0]["loss"]


@pytest.fixture(scope="module")
def tuned(recipe, tmp_path_factory):
    """(output folder, summary) of SFT of the whole model."""
    out = tmp_path_factory.mktemp("tuned")
    return out, align(recipe(out, SFT), console=quiet())


@pytest.fixture(scope="module")
def edited(recipe, tmp_path_factory):
    """(output folder, summary) of the same SFT and an edit by DPO on what it made."""
    out = tmp_path_factory.mktemp("edited")
    return out, align(recipe(out, SFT, EDIT), console=quiet())


def test_a_trained_base_is_written_as_a_model(tuned, model, model_folder):
    out, summary = tuned
    trained = load(out / "model")
    assert trained.config == model.config
    assert trained.fingerprint != model.fingerprint
    assert all(moved(trained.params, model.params)), "every leaf trains"
    assert_same(load(model_folder).params, model.params)
    assert not (out / "adapters").exists()
    assert summary["trained_parameters"] == count_parameters(model.params)
    assert summary["model"] == model.name
    assert json.loads((out / "summary.json").read_text()) == summary
    messages = [{"role": "user", "content": "1 cat?"}]
    assert trained.tokenizer.apply_chat_template(messages, tokenize=False) == model.tokenizer.apply_chat_template(messages, tokenize=False)


def test_an_adapter_leaves_the_trained_base_and_belongs_to_it(tuned, edited, model):
    out, _ = edited
    assert_same(load(out / "model").params, load(tuned[0] / "model").params)
    bank = load_adapters(out / "adapters", load(out / "model").fingerprint)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(bank))
    with pytest.raises(MeetjaxError, match=r"adapter of another base; expected base .*model"):
        load_adapters(out / "adapters", model.fingerprint)


def test_held_out_numbers_compare_with_the_loaded_model(edited, recipe, model):
    out, summary = edited
    split = read_rows(recipe(out, DPO).data, DPO, model.tokenizer, quiet())
    trained, bank = load(out / "model"), load_adapters(out / "adapters")
    policy = row_logps(model.config, trained.params, bank, split.held_out, split.buckets)
    base = row_logps(model.config, model.params, None, split.held_out, split.buckets)
    margin = float(np.mean((policy - base) @ [1, -1]))
    assert abs(summary["held_out_margin_nats"] - margin) < SUMS < abs(margin)


def test_reference_of_a_stage_is_the_base_it_began_with(edited, recipe, tmp_path):
    """DPO starts at ln 2 where policy and reference are one: on the loaded model, and on what SFT made of it."""
    assert first_loss(edited[0], 1) == pytest.approx(math.log(2), abs=1e-6)
    align(recipe(tmp_path, SFT, DPO), console=quiet())
    assert first_loss(tmp_path, 1) == pytest.approx(math.log(2), abs=1e-6)
    assert read_metrics(tmp_path / "stage-1")[-1]["loss"] != pytest.approx(math.log(2), abs=1e-4), "the base trains"


def test_reference_scores_of_a_changed_base_are_in_no_file(recipe, tmp_path, monkeypatch):
    """The fingerprint of the base need not tell two trained bases apart, so only scores of the loaded one are kept."""
    stored = {}
    for name, stages in {"once": (SFT,), "twice": (SFT, DPO, DPO)}.items():
        monkeypatch.setenv("MEETJAX_CACHE", str(tmp_path / name))
        align(recipe(tmp_path / name / "out", *stages), console=quiet())
        with sqlite3.connect(tmp_path / name / "reference.sqlite") as connection:
            stored[name] = connection.execute("select value from scores order by value").fetchall()
        connection.close()
    assert stored["once"] == stored["twice"] != []


def cut_power(patch, batches):
    """`align` breaks off when this many batches have been met."""
    left, put_batch = batches, fit_module.put_batch

    def cut(*arguments):
        nonlocal left
        left -= 1
        if not left:
            raise RuntimeError("power cut")
        return put_batch(*arguments)

    patch.setattr(fit_module, "put_batch", cut)


def test_base_and_adapters_train_together(recipe, model, tmp_path, monkeypatch):
    """On a mesh too, where the base is split and the adapter is not, and in two runs."""
    both = Stage(("base", LoraSpec(rank=2, sites=("q",))), Dpo(), Optim(learning_rate=3e-3))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        cut_power(patch, 4)
        align(recipe(tmp_path, both, mesh=(1, 2, 1)), console=quiet())
    summary = align(recipe(tmp_path, both, mesh=(1, 2, 1)), console=quiet())
    assert [row["step"] for row in read_metrics(tmp_path / "stage-0")] == list(range(1, STEPS + 1))
    assert first_loss(tmp_path, 0) == pytest.approx(math.log(2), abs=1e-6)
    trained = load(tmp_path / "model")
    bank = load_adapters(tmp_path / "adapters", trained.fingerprint)
    assert all(moved(trained.params, model.params))
    assert bank.lora.q.b.any() and dataclasses.replace(bank, lora=None) == Bank()
    assert summary["trained_parameters"] == count_parameters(model.params) + count_parameters(bank)
    again = align(recipe(tmp_path, both, mesh=(1, 2, 1)), console=quiet())
    assert again["held_out_margin_nats"] == summary["held_out_margin_nats"], "a finished run is read and not trained again"


@pytest.mark.parametrize("crash", [3, STEPS + 1, STEPS + 3])
def test_resume_is_bit_equal(edited, recipe, tmp_path, monkeypatch, crash):
    """Between two checkpoints of the base, before the first of the stage that follows it, and between two of that stage."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        cut_power(patch, crash)
        align(recipe(tmp_path, SFT, EDIT), console=quiet())
    assert not (tmp_path / "model").exists()
    align(recipe(tmp_path, SFT, EDIT), console=quiet())
    for file in ("model/model.safetensors", "adapters/adapters.safetensors"):
        assert (tmp_path / file).read_bytes() == (edited[0] / file).read_bytes()


def test_two_copies_of_the_base_and_its_moments_are_held(recipe, model, tmp_path, monkeypatch):
    """In a later stage too: the loaded weights are gone by then."""
    shape, put_batch, counts = model.params["embed"].shape, fit_module.put_batch, []

    def held():
        gc.collect()
        return sum(array.shape == shape and not array.is_deleted() for array in jax.live_arrays())

    before = held()

    def counting(*arguments):
        counts.append(held() - before)
        return put_batch(*arguments)

    monkeypatch.setattr(fit_module, "put_batch", counting)
    align(recipe(tmp_path, SFT, DPO), console=quiet())
    assert [counts[0], counts[STEPS + 1]] == [4, 4]  # beside a batch a step, one a stage for compiling


def test_a_taken_model_folder_is_told_before_training(recipe, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(MeetjaxError, match=r"model: would be overwritten; .*found mine\.txt"):
        align(recipe(tmp_path, SFT), console=quiet())
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["model"]


def test_a_folder_holds_one_run_at_a_time(recipe, tmp_path):
    with claimed(tmp_path), pytest.raises(MeetjaxError, match=r"run folder; expected no other run in it; found one that is going on"):
        align(recipe(tmp_path, SFT), console=quiet())
    with claimed(tmp_path):
        pass
    with pytest.raises(MeetjaxError, match=r"run folder; expected a folder to write to; found (File exists|Not a directory)"):
        align(recipe(write_pairs(tmp_path / "a file"), SFT), console=quiet())


def test_a_quantised_base(recipe, model, tmp_path):
    """QLoRA on a mesh: the first loss is ln 2 against the quantised reference, and the adapter fits the whole base."""
    asked = dataclasses.replace(recipe(tmp_path, EDIT, mesh=(2, 1, 2)), quantize="int8")
    align(asked, console=quiet())
    assert first_loss(tmp_path, 0) == pytest.approx(math.log(2), abs=1e-5)
    assert read_manifest(tmp_path / "adapters")["quantize"] == "int8"
    assert load_adapters(tmp_path / "adapters", model.fingerprint).edit is not None
