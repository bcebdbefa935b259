"""The loop: stopped, killed, diverged or out of space, a run ends with the bits of an undisturbed one or says what is left."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.lora import LoraSpec
from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.records import read_records
from meetjax.data.tokenize import tokenize_records
from meetjax.errors import MeetjaxError
from meetjax.objectives.preference import Dpo
from meetjax.train.fit import Interrupted, fit
from meetjax.train.metrics import read_metrics
from meetjax.train.reference import Reference
from meetjax.train.sharding import make_mesh
from meetjax.train.stage import Optim, Stage, Train
from tests.conftest import RECIPE_STEPS, write_pairs, write_recipe

LORA = LoraSpec(rank=2, sites=("q", "down"))
STEPS, SAVE_EVERY, LENGTH = 8, 3, 64
KILLS, SEED = 10, 20240607


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    records, _ = read_records(write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"), "pair")
    return tokenize_records(records, model.tokenizer, LENGTH)[0]


@pytest.fixture(autouse=True, scope="module")
def shared_programs(shared_training):
    yield


class Disturbing(Reference):
    """Calls `disturb` before the batch of one step; `fit` asks for the reference of every batch."""

    def __init__(self, model, step, disturb):
        super().__init__(model.config, model.params)
        self.left, self.disturb = step, disturb

    def attach(self, *arguments):
        self.left -= 1
        if self.left == 0:
            self.disturb()
        return super().attach(*arguments)


def train(model, rows, folder, *, reference=None, specs=(LORA,), bank=None, rate=1e-2, save_every=SAVE_EVERY, params=None, identity=None):
    """(params, bank) after a DPO stage of STEPS steps in `folder`."""
    bank = bank or init_bank(model.config, model.params, specs, model.tokenizer, jax.random.key(0))
    return fit(
        model.config, params or model.params, bank, rows, Stage(specs, Dpo(), Optim(learning_rate=rate)),
        Train(steps=STEPS, batch_size=4, save_every=save_every), folder,
        buckets=choose_buckets(rows), mesh=make_mesh((1, 1, 1)), identity=identity or {"fingerprint": model.fingerprint},
        reference=reference, console=Console(file=io.StringIO()),
    )  # fmt: skip


def losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(model, rows, tmp_path_factory):
    """(bank, losses) of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, bank = train(model, rows, folder)
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1))
    return bank, losses(folder)


def crash():
    raise RuntimeError("power cut")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "disturb", "raised"),
    [
        (2, crash, RuntimeError),
        (5, crash, RuntimeError),
        (1, terminate, Interrupted),
        (5, terminate, Interrupted),
        (8, terminate, Interrupted),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_resume_is_bit_equal(model, rows, undisturbed, tmp_path, step, disturb, raised):
    """Whether it crashed before its first checkpoint, between two, or was told to stop: same adapters, same losses, each step once."""
    with pytest.raises(raised) as caught:
        train(model, rows, tmp_path, reference=Disturbing(model, step, disturb))
    if raised is Interrupted:
        assert f"after step {step}, saved in {tmp_path}" in str(caught.value)
    assert len(losses(tmp_path)) < STEPS or step == STEPS
    _, bank = train(model, rows, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, bank, undisturbed[0])
    assert losses(tmp_path) == undisturbed[1]


def test_signal_handler_is_put_back(model, rows, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(model, rows, tmp_path, reference=Disturbing(model, 1, terminate))
    assert signal.getsignal(signal.SIGTERM) is before


def test_finished_run_is_not_trained_again(model, rows, undisturbed, tmp_path):
    train(model, rows, tmp_path)
    _, bank = train(model, rows, tmp_path, reference=Disturbing(model, 1, crash))
    jax.tree.map(np.testing.assert_array_equal, bank, undisturbed[0])


def test_nan_names_the_last_good_checkpoint(model, rows, tmp_path):
    """A rate that throws the adapter to infinity: nothing that is not finite is saved, and the message says what is left."""
    with pytest.raises(MeetjaxError) as caught:
        train(model, rows, tmp_path, rate=1e38, save_every=1)
    message = str(caught.value)
    assert "\n" not in message
    good = [step for step, loss, norm in losses(tmp_path) if loss is not None and norm is not None]
    assert good
    assert f"at step {good[-1] + 1}; expected a finite number; found nan" in message
    assert f"last good checkpoint: step {good[-1]} in {tmp_path / 'checkpoints'}" in message
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == good[-1]


def test_nan_in_the_base_has_no_good_checkpoint(model, rows, tmp_path):
    poisoned = model.params | {"norm": model.params["norm"].at[0].set(np.nan)}
    with pytest.raises(MeetjaxError, match="loss at step 1; expected a finite number; found nan; last good checkpoint: none"):
        train(model, rows, tmp_path, params=poisoned, reference=Reference(model.config, poisoned))


def test_checkpoint_of_another_base_is_refused(model, rows, tmp_path):
    with pytest.raises(Interrupted):
        train(model, rows, tmp_path, reference=Disturbing(model, 1, terminate))
    with pytest.raises(MeetjaxError, match="checkpoint of another run: fingerprint"):
        train(model, rows, tmp_path, identity={"fingerprint": "of another base"})


def test_data_that_changed_is_refused(model, rows, tmp_path):
    with pytest.raises(Interrupted):
        train(model, rows, tmp_path, reference=Disturbing(model, 1, terminate))
    records, _ = read_records(write_pairs(tmp_path / "pairs.jsonl", 20), "pair")
    with pytest.raises(MeetjaxError, match="loader state: key"):
        train(model, tokenize_records(records, model.tokenizer, LENGTH)[0], tmp_path)


def test_stage_trains_only_what_it_names(model, rows, tmp_path):
    """A bank may hold adapters of an earlier stage: they take part and stay as they are."""
    both = init_bank(model.config, model.params, (LORA, EditSpec()), model.tokenizer, jax.random.key(0))
    _, bank = train(model, rows, tmp_path, bank=both)
    jax.tree.map(np.testing.assert_array_equal, bank.edit, both.edit)
    assert not np.array_equal(bank.lora.q.b, both.lora.q.b)


def test_reference_does_not_depend_on_what_came_before(model, rows):
    """A row that appears twice, in other company: a resumed run meets the batches in another order and must see the same bits."""
    (short, chosen), *_ = eval_batches(rows, 4, choose_buckets(rows))
    (wide, _), *_ = eval_batches(rows, 4, (100,))
    assert short.tokens.shape != wide.tokens.shape
    mesh, bits = make_mesh((1, 1, 1)), []
    for order in ((short, wide), (wide, short)):
        reference = Reference(model.config, model.params)
        found = {batch.tokens.shape: reference.attach(batch, rows, chosen, mesh).ref_logps for batch in order}
        bits.append(found)
    for shape in (short.tokens.shape, wide.tokens.shape):
        np.testing.assert_array_equal(bits[0][shape], bits[1][shape])


def last_step(out):
    """The last finished step in the log of a run that goes on."""
    try:
        return json.loads((out / "stage-0" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def wait_until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing happened for a minute"
        time.sleep(0.002)


def adapters(out):
    return load_file(out / "adapters" / "adapters.safetensors")


def assert_same_adapters(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_killed_ten_times_ends_with_the_same_bits(aligned, command, tmp_path):
    """kill -9 at ten random steps, each run going on where the last checkpoint of the one before stands."""
    (file, finished, _), draw, out, killed = aligned, random.Random(SEED), tmp_path / "out", []
    for goal in sorted(draw.sample(range(1, RECIPE_STEPS - 12), KILLS)):
        goal = max(goal, last_step(out) + 1)
        pid = command.start("align", file, "--set", f"out={out}")
        wait_until(lambda goal=goal: last_step(out) >= goal)
        time.sleep(draw.uniform(0, 0.02))  # anywhere within a step, a write of the log or of a checkpoint
        os.kill(pid, signal.SIGKILL)
        assert command.finish().status == -signal.SIGKILL
        killed.append(last_step(out))
    assert killed == sorted(set(killed))  # each run got beyond the one before
    done = command("align", file, "--set", f"out={out}")
    assert done.status == 0, done.err
    assert_same_adapters(adapters(out), adapters(finished))
    assert [row["step"] for row in read_metrics(out / "stage-0")] == list(range(1, RECIPE_STEPS + 1))


def test_sigterm_saves_and_the_same_command_goes_on(aligned, command, tmp_path):
    (file, finished, _), out = aligned, tmp_path / "out"
    arguments = ("align", file, "--set", f"out={out}")
    pid = command.start(*arguments)
    wait_until(lambda: last_step(out) >= 4)
    os.kill(pid, signal.SIGTERM)
    stopped = command.finish()
    assert stopped.status == 143
    (line,) = stopped.err.splitlines()
    step = max(int(path.name) for path in (out / "stage-0" / "checkpoints").iterdir())
    assert last_step(out) == step
    assert line == f"stopped by SIGTERM after step {step}, saved in {out / 'stage-0'}; run the same command to go on"
    assert not (out / "adapters").exists()
    done = command(*arguments)
    assert done.status == 0, done.err
    assert f"steps {step} to {RECIPE_STEPS}" in done.out
    assert_same_adapters(adapters(out), adapters(finished))


def test_full_disk_while_saving_leaves_the_checkpoint_before(model_folder, command, tmp_path):
    """A limit on file size stands for the disk that fills up: the state no longer fits, its log still does."""
    file, out = write_recipe(tmp_path, model_folder), tmp_path / "out"
    folder = out / "stage-0" / "checkpoints"
    arguments = ("align", file, "--set", f"out={out}", "--set", "train.save_every=2")
    pid = command.start(*arguments)
    wait_until(lambda: (folder / "4").exists())
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (150_000, 150_000))
    failed = command.finish()
    assert failed.status == 2
    (line,) = failed.err.splitlines()
    assert line.startswith(f"error: {folder}: checkpoint could not be written; found ")
    assert "earlier checkpoints are untouched; free space" in line
    whole = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    assert whole
    done = command(*arguments)
    assert done.status == 0, done.err
    assert f"steps {max(whole)} to {RECIPE_STEPS}" in done.out
