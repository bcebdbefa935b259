"""What a stage sees: the form, the classes, their gates and markers; and MEET's laws on a stage of controls."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.tree import Bank, columns
from meetjax.data.loader import eval_batches
from meetjax.data.tokenize import answer_ids, laid_lengths
from meetjax.errors import MeetjaxError
from meetjax.objectives.logps import answer_logps
from meetjax.objectives.preference import Dpo
from meetjax.objectives.reward import BradleyTerry
from meetjax.objectives.sft import Sft
from meetjax.train.stage import Data, Stage, View
from meetjax.train.step import make_gradient, partition
from meetjax.train.view import check_columns, read_rows
from tests.conftest import assert_close, write_pairs

CONTROLS = (LoraSpec(rank=2, sites=("q", "v")), PromptSpec(length=2, text=("bad", "good")), EditSpec())


@dataclasses.dataclass(frozen=True)
class LabelledSft(Sft):
    """Likelihood of labelled answers, whatever their class."""

    form = "labelled"


@dataclasses.dataclass(frozen=True)
class Partnered(LabelledSft):
    partners = True


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return str(write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"))


def split_of(model, path, objective, view=None, **data):
    stage = Stage(objective=objective, view=view or View())
    return read_rows(Data(path=path, **({"held_out": 6, "max_length": 64} | data)), stage, model.tokenizer, Console(file=io.StringIO()))


def test_pairs_become_two_labelled_rows_and_stay_pairs_when_held_out(model, pairs_file):
    """Every form is cut from the same split, so no stage trains on what is held out."""
    pairs, labelled, chosen = (split_of(model, pairs_file, objective) for objective in (Dpo(), LabelledSft(), Sft()))
    assert len(labelled.train) == 2 * len(pairs.train) and len(chosen.train) == len(pairs.train)
    assert labelled.train.classes.tolist() == [1, 0] * len(pairs.train)
    for n in range(len(pairs.train)):
        for c in range(2):
            assert np.array_equal(answer_ids(labelled.train, 2 * n + c, 0), answer_ids(pairs.train, n, c))
    assert pairs.records == labelled.records == chosen.records and pairs.held_out.starts.shape == (6, 2)
    assert labelled.contrast is None, "without a view nobody is told the classes"


def test_columns_of_other_names_split_by_prompt(model, tmp_path):
    """Demonstrations with several answers to a prompt: none of a held-out prompt trains."""
    file = tmp_path / "set.csv"
    file.write_text("mr,ref\n" + "".join(f"name[{i // 4}],it is {i}\n" for i in range(80)))
    found = split_of(model, str(file), Sft(), columns=("mr", "ref"))
    held_out = {record.prompt for record in found.records}
    assert len(found.held_out) == 6 and len(found.train) == 80 - 4 * len(held_out)


def test_labelled_answers_are_pairs_when_held_out_from_a_reward_model(model, tmp_path):
    answers = (("the cat", True), ("how are you", False))
    rows = [{"prompt": f"{i} cat?", "completion": text, "label": label} for i in range(12) for text, label in answers]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert split_of(model, str(tmp_path / "labelled.jsonl"), BradleyTerry()).held_out.starts.shape[1] == 2


def test_a_goal_asks_each_answer_for_its_own_score(model, tmp_path):
    rows = [
        {"prompt": f"{i} cat?", "chosen": "the cat", "rejected": "how are you", "score_chosen": 8, "score_rejected": 3} for i in range(12)
    ]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = split_of(model, str(file), Dpo(), View(goal="Score {score:g}"), form="scored")
    prompts = len({record.prompt for record in found.records})
    assert len(found.held_out) == prompts and len(found.train) == 2 * (12 - prompts), "each way round, and no prompt on both sides"
    texts = [model.tokenizer.decode(answer_ids(table, 0, 0)) for table in (found.train, found.held_out)]
    assert "Score 8" in texts[0] and "Score 8" in texts[1] and "Score 3" in model.tokenizer.decode(answer_ids(found.train, 1, 0))
    for view, form, message in (
        (View(goal="Score {score:g}"), "pair", "scored records"),
        (View(goal="Score"), "scored", "a text with {score:g}"),
        (View(goal="Score {s}"), "scored", "a text with {score:g}"),
    ):
        with pytest.raises(MeetjaxError, match=message):
            split_of(model, str(file), Dpo(), view, form=form)


def test_classes_choose_gates_and_held_out_pairs_are_seen_under_both(model, pairs_file):
    found = split_of(model, pairs_file, LabelledSft(), View(controls=2))
    np.testing.assert_array_equal(found.train.gates, np.eye(2)[found.train.classes])
    assert (found.held_out.gates == [0, 1]).all() and (found.contrast.gates == [1, 0]).all()
    positives = split_of(model, pairs_file, LabelledSft(), View(controls=2, keep=(1,)))
    assert (positives.train.gates == [0, 1]).all() and positives.contrast is None
    under_good = split_of(model, pairs_file, Dpo(), View(gates=((0.0, 1.0),)))
    assert (under_good.train.gates == [0, 1]).all() and under_good.contrast is None


def test_markers_stand_before_the_answer_and_are_not_learned(model, pairs_file):
    plain = split_of(model, pairs_file, LabelledSft())
    marked = split_of(model, pairs_file, LabelledSft(), View(markers=("bad ", "good ")))
    cases = ((marked.train, plain.train, None), (marked.held_out, plain.held_out, 1), (marked.contrast, plain.held_out, 0))
    for rows, other, label in cases:
        for n in range(len(rows)):
            text, without = (model.tokenizer.decode(answer_ids(r, n, 0)[: r.starts[n, 0]]) for r in (rows, other))
            assert text.rstrip() == without + ("bad", "good")[rows.classes[n] if label is None else label]
            assert (rows.lengths - rows.starts)[n, 0] == (other.lengths - other.starts)[n, 0]


def test_partners_are_asked_for_by_the_objective(model, pairs_file):
    assert split_of(model, pairs_file, Partnered()).train.starts.shape[1] == 2
    assert split_of(model, pairs_file, LabelledSft()).train.starts.shape[1] == 1


def test_what_a_view_cannot_be_is_told(model, pairs_file):
    for objective, view, message in [
        (Dpo(), View(controls=2), "recipe: view; expected labelled rows, or gates for one class; found gates for 2 classes"),
        (LabelledSft(), View(gates=((1.0, 0.0),) * 1, markers=("a",)), "markers; expected one for each class"),
        (LabelledSft(), View(controls=3), "data: class 2; expected at least one row of each class that trains; found none"),
        (Dpo(), View(markers=("a", "b")), "2 for records without a class"),
    ]:
        with pytest.raises(MeetjaxError, match=message):
            split_of(model, pairs_file, objective, view)
    bank = init_bank(model.config, model.params, CONTROLS, model.tokenizer, jax.random.key(0), 2)
    with pytest.raises(MeetjaxError, match=r"stages\.1\.view; expected gates for 2 columns, or controls=2"):
        check_columns(bank, split_of(model, pairs_file, LabelledSft()).train, "stages.1")
    with pytest.raises(MeetjaxError, match="one text, or one for each of 3 columns; found 2"):
        init_bank(model.config, model.params, CONTROLS, model.tokenizer, jax.random.key(0), 3)


def test_lengths_that_do_not_hold_the_rows_are_told_before_training(model, tmp_path):
    """Held-out rows too, which training alone would not meet."""
    lines = write_pairs(tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join([*lines, json.dumps({"prompt": "long?", "chosen": "the cat", "rejected": "a cat " * 9})])
    )
    path = str(tmp_path / "pairs.jsonl")
    splits = ((seed, split_of(model, path, Dpo(), seed=seed)) for seed in range(99))
    seed, found = next((seed, split) for seed, split in splits if "long?" in {record.prompt for record in split.records})
    trained, held = (int(laid_lengths(rows).max()) for rows in (found.train, found.held_out))
    assert trained < held
    assert split_of(model, path, Dpo(), seed=seed, buckets=(16, held)).buckets == (16, held)
    with pytest.raises(
        MeetjaxError, match=rf"recipe: data\.buckets; expected a last one of {held} or more.*; found \({trained},\); add one"
    ):
        split_of(model, path, Dpo(), seed=seed, buckets=(trained,))


scores = jax.jit(answer_logps, static_argnums=0)


@pytest.fixture(scope="module")
def controlled(model, pairs_file):
    """(bank of two controls of three kinds, rows)."""
    bank = init_bank(model.config, model.params, CONTROLS, model.tokenizer, jax.random.key(0), 2)
    rows = split_of(model, pairs_file, LabelledSft(), View(controls=2)).train
    check_columns(bank, rows, "stages.0")
    assert columns(bank) == 2
    return bank, rows


def test_class_without_rows_has_no_gradient(model, controlled):
    """The gradient of a control on a batch without rows of its class is exactly zero."""
    bank, rows = controlled
    good = np.flatnonzero(rows.classes == 1)
    batch, _ = next(eval_batches(subset(rows, good[:4]), 4, (64,)))
    for kind in ("lora", "prompt", "edit"):
        parts = partition(model.params, bank, kinds=(kind,), base=False)
        gradient, _ = jax.jit(make_gradient(model.config, LabelledSft()))(*parts, batch)
        axis = 0 if kind == "prompt" else 1
        for leaf in jax.tree.leaves(getattr(gradient.adapters, kind)):
            assert not np.take(np.asarray(leaf), 0, axis).any(), kind
        assert any(np.take(np.asarray(leaf), 1, axis).any() for leaf in jax.tree.leaves(getattr(gradient.adapters, kind))), kind


def test_mixed_batch_equals_class_pure_batches(model, controlled):
    """Each row is scored as if its own control were the only adapter there is."""
    bank, rows = controlled
    rows = subset(rows, np.arange(6))
    batch, chosen = next(eval_batches(rows, 6, (64,)))
    mixed = scores(model.config, model.params, bank, batch)
    for label in (0, 1):
        alone = Bank(
            prompt=dataclasses.replace(bank.prompt, vectors=bank.prompt.vectors[label : label + 1], entries=(0,)),
            lora=dataclasses.replace(jax.tree.map(lambda leaf, at=label: leaf[:, at : at + 1], bank.lora), entries=(0,)),
            edit=dataclasses.replace(jax.tree.map(lambda leaf, at=label: leaf[:, at : at + 1], bank.edit), entries=(0,)),
        )
        pure = scores(model.config, model.params, alone, dataclasses.replace(batch, gates=None))
        own = rows.classes[chosen] == label
        assert own.any()
        assert_close(np.asarray(mixed)[own], np.asarray(pure)[own], factor=16)


def test_lora_controls_start_equal(model, controlled):
    bank, rows = controlled
    batch, _ = next(eval_batches(rows, 4, (64,)))
    swapped = dataclasses.replace(batch, gates=batch.gates[:, ::-1])
    start = Bank(lora=bank.lora, edit=bank.edit)
    np.testing.assert_array_equal(scores(model.config, model.params, start, batch), scores(model.config, model.params, start, swapped))


def subset(rows, chosen):
    """The rows at `chosen`, in their order."""
    fields = ("offsets", "starts", "lengths", "common", "hashes", "records", "classes", "gates")
    return dataclasses.replace(rows, **{name: None if getattr(rows, name) is None else getattr(rows, name)[chosen] for name in fields})
