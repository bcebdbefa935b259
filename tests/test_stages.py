"""The papers' recipes as lists of stages, on a tiny model: MEET's two stages, RAHF's, and what is measured at the end."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import meetjax.evaluate.preference as preference_module
import meetjax.train.reference as reference_module
from meetjax.adapters.algebra import merge_model
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.io import load_adapters
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.reward import RewardSpec
from meetjax.adapters.tree import count_parameters
from meetjax.align import align
from meetjax.data.records import Pair
from meetjax.data.tokenize import tokenize_records
from meetjax.errors import MeetjaxError
from meetjax.evaluate.curves import dial_curve
from meetjax.evaluate.preference import row_rewards
from meetjax.models.load import load
from meetjax.objectives.figa import Figa
from meetjax.objectives.kto import Kto
from meetjax.objectives.logps import answer_logps
from meetjax.objectives.preference import Dpo
from meetjax.objectives.representation import Rahf, Scit
from meetjax.objectives.reward import BradleyTerry
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.metrics import read_metrics
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View, override
from meetjax.train.view import read_rows
from tests.conftest import write_pairs

STEPS = 6
CONTROLS = View(controls=2)
LORA, PROMPT = LoraSpec(rank=4, sites=("q", "v")), PromptSpec(length=2, text=("bad", "good"))
STAGE_1 = Stage((LORA, PROMPT), ConditionalSft(per_class=True), Optim(learning_rate=3e-2), CONTROLS)
TEACHERS = Stage((LORA,), ConditionalSft(per_class=True), Optim(learning_rate=3e-2), CONTROLS)
BOTH_WAYS = View(instructions=("Be bad.", "Be good."))


quick_logps = jax.jit(answer_logps, static_argnums=0)


@pytest.fixture(autouse=True, scope="module")
def surroundings(shared_training, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEETJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        for module in (preference_module, reference_module):
            patch.setattr(module, "compiled_answer_logps", quick_logps)
        yield


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """Aligns by these stages: (output folder, summary)."""
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")

    def go(*stages, prompts=0):
        out = tmp_path_factory.mktemp("out")
        data = Data(path=str(pairs), held_out=6, max_length=64, buckets=(96,))
        recipe = Recipe("tiny", str(model_folder), data, Train(steps=STEPS, batch_size=4), stages, str(out))
        recipe = dataclasses.replace(recipe, evaluation=Evaluation(prompts=prompts, max_new_tokens=4))
        return out, align(recipe, console=Console(file=io.StringIO()))

    return go


@pytest.fixture(scope="module")
def stage_1(run):
    return run(STAGE_1, prompts=3)


def test_meet_stage_1_tells_classes_apart_and_leaves_the_model(stage_1, model):
    """NLL of good answers falls below that of the other control: held-out accuracy is of the contrast of the controls."""
    out, summary = stage_1
    rows = read_metrics(out / "stage-0")
    assert {"nll/good", "nll/bad"} <= rows[0].keys() and rows[-1]["loss"] < rows[0]["loss"]
    assert not (out / "model").exists() and summary["held_out_accuracy"] > 0.6
    bank = load_adapters(out / "adapters", model.fingerprint)
    assert bank.lora.entries == bank.prompt.entries == (0, 1)
    assert (
        summary["kl"] > 0 and 1 <= summary["mean_tokens"] <= 4 and summary["kl_interval"][0] <= summary["kl"] <= summary["kl_interval"][1]
    )


def test_meet_stage_2_starts_where_stage_1_ended(run, stage_1, model):
    """The first loss of stage 2 is that of the state that stage 1 left; the base learns at a rate of its own."""
    both = Stage(
        ("base", LORA, PROMPT), ConditionalSft(per_class=True), Optim(1e-3, base_learning_rate=1e-4, schedule="constant"), CONTROLS
    )
    out, summary = run(STAGE_1, both)
    trained, bank = load(out / "model"), load_adapters(out / "adapters", load(out / "model").fingerprint)
    before = load_adapters(stage_1[0] / "adapters", model.fingerprint)
    first, last = (read_metrics(folder / f"stage-{i}") for folder, i in ((out, 1), (stage_1[0], 0)))
    assert first[0]["loss"] < last[0]["loss"] - 0.1, "not started anew"
    steps = [
        np.abs(np.asarray(a - b)).max() for a, b in ((trained.params["embed"], model.params["embed"]), (bank.lora.q.a, before.lora.q.a))
    ]
    assert 0 < steps[0] < 2e-4 * STEPS and 5e-4 < steps[1] < 2e-3 * STEPS
    assert summary["held_out_accuracy"] > 0.6


def test_dpo_under_the_good_control_starts_at_its_own_reference(run):
    """Stage 2 by pairs: ln 2 when the reference is what stage 1 left, and not when it is the bare base."""
    view, losses = View(gates=((0.0, 1.0),)), {}
    for reference in ("start", "base"):
        out, _ = run(TEACHERS, Stage((LORA,), Dpo(), Optim(1e-3), view, reference=reference))
        losses[reference] = read_metrics(out / "stage-1")[0]["loss"]
    assert losses["start"] == pytest.approx(math.log(2), abs=1e-6) != pytest.approx(losses["base"], abs=1e-4)


def test_dual_fits_a_lora_to_two_models(run, model):
    """The good adapter becomes the base, the difference to the bad one the direction; what comes out needs no instruction."""
    taught, _ = run(TEACHERS)
    teachers = load_adapters(taught / "adapters", model.fingerprint)
    fit = Stage(
        (LoraSpec(rank=8, sites=("q", "v")),), Rahf((1,), 1.0, asks=("plain",), looks=((0, ()), (0, ()), (0, (1.0, -1.0)))),
        Optim(3e-2), View(), absorb=(0.0, 1.0),
    )  # fmt: skip
    out, summary = run(TEACHERS, fit)
    base = load(out / "model")
    good = merge_model(model, teachers, (0.0, 1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), base.params, good.params)
    rows = read_metrics(out / "stage-1")
    assert rows[0]["loss"] == pytest.approx(rows[0]["direction"], rel=1e-4) and rows[-1]["loss"] < rows[0]["loss"]
    assert load_adapters(out / "adapters", base.fingerprint).lora.q.b[0].any()
    assert 0 <= summary["held_out_accuracy"] <= 1


def test_scit_learns_instructions_then_does_without(run):
    tune = Stage((LoraSpec(rank=4, sites=("q", "v")),), Scit(), Optim(1e-2), BOTH_WAYS)
    fit = Stage((LoraSpec(rank=4, sites=("q", "v")),), Rahf((1,), 1.0), Optim(1e-2), BOTH_WAYS, absorb=(1.0,))
    out, _ = run(tune, fit)
    tuned, fitted = (read_metrics(out / f"stage-{i}") for i in (0, 1))
    assert tuned[-1]["loss"] < tuned[0]["loss"] and "instruction/accuracies" in tuned[0]
    assert fitted[-1]["loss"] < fitted[0]["loss"] == pytest.approx(fitted[0]["direction"], rel=1e-4)


def test_reward_rises_along_the_dial_of_an_identity_block(run, model):
    """CLM's law on a task that it has learned: with every step of lambda from 0 to 1 the margin grows."""
    out, _ = run(Stage((IdentitySpec(),), Dpo(), Optim(1e-3)))
    bank = load_adapters(out / "adapters", model.fingerprint)
    rows, _ = tokenize_records([Pair(f"{n} cat?", "the mat", "a cat on the mat", f"f:{n}") for n in range(3)], model.tokenizer, 64)
    curve = dial_curve(model.config, model.params, bank, rows, (64,), (0.0, 0.25, 0.5, 0.75, 1.0), batch_size=2)
    assert np.all(np.diff([point["reward_margin"] for point in curve]) > 1e-3)


def test_kto_runs_on_pairs(run):
    out, _ = run(Stage((LORA,), Kto(), Optim(1e-2)))
    rows = read_metrics(out / "stage-0")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-6) and rows[-1]["loss"] < 0.5 and rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_reward_model_is_judged_by_its_rewards(run, model):
    """Rewards start at 0; the held-out numbers are those of the head that is saved, without a reference."""
    stage = Stage((LORA, RewardSpec()), BradleyTerry(kappa=0.01), Optim(3e-2))
    out, summary = run(stage)
    rows = read_metrics(out / "stage-0")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[0]["rewards/chosen"] == rows[0]["rewards/rejected"] == 0 and "logps/chosen" not in rows[0]
    bank = load_adapters(out / "adapters", model.fingerprint)
    assert summary["trained_parameters"] == count_parameters(bank.lora) + model.config.width
    recipe = summary["recipe"]["data"]
    split = read_rows(Data(path=recipe["path"], held_out=6, max_length=64), stage, model.tokenizer, Console(file=io.StringIO()))
    margins = row_rewards(model.config, model.params, bank, split.held_out, (96,)) @ [1, -1]
    assert summary["held_out_accuracy"] == np.mean(margins > 0) and summary["held_out_n"] == 6
    assert summary["held_out_margin_nats"] == pytest.approx(np.mean(margins), abs=1e-5)


def test_figa_runs_on_pairs(run):
    out, summary = run(Stage((LORA,), Figa(), Optim(1e-2)))
    rows = read_metrics(out / "stage-0")
    assert rows[-1]["nll/new"] < rows[0]["nll/new"] and 0 <= rows[0]["kept/dropped"] <= 1 and "held_out_accuracy" in summary


def test_what_stages_cannot_be_is_told_before_the_first_trains(run, monkeypatch):
    monkeypatch.setattr("meetjax.align.fit", lambda *_, **__: pytest.fail("a stage began"))
    for stages, message in [
        ((STAGE_1, Stage((LORA,), Dpo())), r"recipe: stages\.1\.view; expected gates for 2 columns"),
        ((TEACHERS, Stage((LORA,), Dpo(), absorb=(1.0,))), r"gates: shape; expected \(1, 2\)"),
        ((Stage((LORA,), Rahf((9,)), Optim(), BOTH_WAYS),), "taps; expected 0 to 2, one of them above 0; found"),
        (
            (TEACHERS, Stage((LORA,), Rahf((1, 9)), Optim(), BOTH_WAYS, absorb=(0.0, 1.0))),
            r"stages\.1\.objective\.taps; expected 0 to 2, .* found \(1, 9\)",
        ),
        ((TEACHERS, Stage((IdentitySpec(layer=9),), Dpo())), "identity: layer; expected -2 to 1; found 9"),
        ((Stage((LORA,), Rahf((1,))),), r"view\.instructions; expected two texts"),
        ((Stage((LORA,), ConditionalSft(), Optim(), View(controls=2, keep=(2,))),), "view.keep; expected classes among 0, 1; found 2"),
        ((Stage((LORA,), Rahf((1,), asks=("plain",), looks=((0, ()),) * 2)),), "looks; expected three: h, h_good and h_bad; found 2"),
        ((Stage((LORA,), Rahf((1,), asks=("plain",))),), "looks; expected prompts 0 to 0, those of asks; found 1"),
        ((Stage((LORA,), Rahf((1,), asks=("plain",), looks=((0, ()), (0, ()), (0, (1.0,))))),), "looks; expected adapters that this stage"),
        ((Stage((LORA,), ConditionalSft(), Optim(), View(controls=-1)),), r"view\.controls; expected >= 0; found -1"),
        ((Stage((LORA,), ConditionalSft(), Optim(), View(gates=((1.0,), (1.0, 0.0)))),), r"view\.gates; expected as many for every class"),
    ]:
        with pytest.raises(MeetjaxError, match=message):
            run(*stages)


FOLDER = Path(__file__).parent.parent / "experiments"
EXPERIMENTS = sorted(path for path in FOLDER.glob("*.py") if "def get_config()" in path.read_text())
SHORT = {
    "rahf_scit": ["stages.0.view.instructions=bad,good", "stages.1.view.instructions=bad,good"],
    "red_e2e": ["data.columns="],
    "ra_dpo": ["data.form=auto", "data.split=none", "stages.0.view.goal="],
}


def load_experiment(name):
    """The module of `experiments/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_runs(file, model_folder, tmp_path):
    """All its stages, a step each, on a tiny model; every one says in its docstring how to run it."""
    module = load_experiment(file.stem)
    assert f"meetjax align experiments/{file.stem}.py" in module.__doc__ and module.get_config().name == file.stem
    data = f"data.path={write_pairs(tmp_path / 'pairs.jsonl')}", "data.held_out=6", "data.max_length=64", "data.buckets=128"
    run = f"model={model_folder}", f"out={tmp_path / 'out'}", "train.steps=1", "train.batch_size=4"
    recipe = override(module.get_config(), [*data, *run, "evaluation.prompts=0", *SHORT.get(file.stem, [])])
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage.objective, Rahf):
            recipe = override(recipe, [f"stages.{i}.objective.taps=1"])
    summary = align(recipe, console=Console(file=io.StringIO()))
    assert 0 <= summary["held_out_accuracy"] <= 1 and summary["trained_parameters"] > 0
