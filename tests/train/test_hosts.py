"""Two real processes of four devices each: they train as one process of eight does, and fail together, in one line and in time."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from meetjax.adapters.bank import init_bank
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.tree import flatten
from meetjax.errors import MeetjaxError
from meetjax.launch import LOST
from meetjax.train.hosts import share_of
from meetjax.train.metrics import read_metrics
from tests.conftest import write_model, write_pairs, write_recipe

STEPS, SAVE_EVERY = 10, 2
WAIT = 8
"""Seconds that one host waits for another: the tests that lose one take about as long."""
LIMIT = 150
"""Seconds after which a process is killed and its test fails."""
SAME = 1e-6
"""Nats: losses of order 1 whose sums over rows are added in another order."""
LORA = 'LoraSpec(rank=2, sites=("q", "down")),'
MESH = "1,8,1"
"""Each process holds half of the rows and half of every weight."""
GONE = "is gone: killed, cut off, or ended by an error of its own; see its log; the last checkpoint stands"
GLOO = re.compile(r"\[Gloo\] Rank |is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+")
"""The pieces of the lines that Gloo prints from several threads at once, so that one line's can stand in the middle of another's."""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def file(model_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), model_folder, steps=STEPS, trains=LORA)


@pytest.fixture(scope="module")
def hosts(command, file):
    """`hosts(out, *settings)` runs the recipe in two processes, or starts it: `own` are settings of process 1 alone."""

    def arguments(out, settings, mesh, script=file):
        fixed = (f"out={out}", f"train.mesh={mesh}", "train.batch_size=8", "data.buckets=64", f"train.save_every={SAVE_EVERY}")
        return ["align", script, *(part for setting in (*fixed, *settings) for part in ("--set", setting))]

    def start(out, *settings, mesh=MESH, own=(), folders=(None, None), which=(0, 1), script=file):
        port, pids = free_port(), []
        for i in which:
            told = ("--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", i)
            place = {"folder": folders[i]} if folders[i] else {}
            given = arguments(out, (*settings, *(own if i else ())), mesh, script)
            pids.append(command.start(*given, *told, devices=4, limit=LIMIT, **place, MEETJAX_HOST_TIMEOUT=str(WAIT)))
        return pids

    def run(out, *settings, **how):
        return [command.finish(pid) for pid in start(out, *settings, **how)]

    def alone(out, *settings, mesh=MESH):
        return command.finish(command.start(*arguments(out, settings, mesh), devices=8, limit=LIMIT))

    run.start, run.alone, run.finish = start, alone, command.finish
    return run


def losses(out):
    return np.array([[row["loss"], row["grad_norm"], row["rewards/margins"]] for row in read_metrics(out / "stage-0")])


def adapters(out):
    return load_file(out / "adapters" / "adapters.safetensors")


def assert_same_adapters(out, other, tolerance=0.0):
    ours, theirs = adapters(out), adapters(other)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=tolerance, err_msg=path)


def errors(ended):
    """Exit status and the lines of stderr of each process."""
    return [(one.status, one.err.splitlines()) for one in ended]


def wait_for(condition):
    limit = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("shape", "order", "shares"),
    [
        ((8, 1, 1), range(8), [(0, 2), (1, 2)]),
        ((2, 2, 2), range(8), [(0, 2), (1, 2)]),
        ((2, 2, 2), [4, 5, 6, 7, 0, 1, 2, 3], [(1, 2), (0, 2)]),
        ((1, 1, 8), range(8), [(0, 1), (0, 1)]),
        ((2, 1, 4), [0, 1, 4, 5, 2, 3, 6, 7], [(0, 1), (0, 1)]),
        ((4, 1, 2), [0, 1, 4, 5, 2, 3, 6, 7], None),
    ],
    ids=["data", "all axes", "hosts swapped", "model over hosts", "each place on both", "rows apart"],
)
def test_each_host_has_the_rows_of_its_devices(monkeypatch, shape, order, shares):
    """Devices 0 to 3 belong to process 0, 4 to 7 to process 1."""
    devices = np.array([types.SimpleNamespace(process_index=i // 4) for i in order], object).reshape(shape)
    mesh = types.SimpleNamespace(
        devices=devices, axis_names=("data", "fsdp", "model"), shape=dict(zip(("data", "fsdp", "model"), shape, strict=True))
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for host in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        if shares:
            assert share_of(mesh) == shares[host]
        else:
            with pytest.raises(MeetjaxError, match=r"train\.mesh; expected the same number of neighbouring data x fsdp places a host"):
                share_of(mesh)


@pytest.fixture(scope="module")
def undisturbed(hosts, tmp_path_factory):
    """(output folder, what both processes left) of a run over two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    ended = hosts(out)
    assert errors(ended) == [(0, []), (0, [])]
    return out, ended


def test_two_processes_train_as_one_does(hosts, undisturbed, tmp_path):
    """The same losses, gradients and held-out numbers; the first process alone prints and writes."""
    out, (first, second) = undisturbed
    assert hosts.alone(tmp_path / "out").status == 0
    np.testing.assert_allclose(losses(out), losses(tmp_path / "out"), rtol=0, atol=SAME * 10)
    np.testing.assert_allclose(losses(out)[:, 0], losses(tmp_path / "out")[:, 0], rtol=0, atol=SAME)
    assert len(losses(out)) == STEPS and losses(out)[-1, 0] < losses(out)[0, 0] - 0.1
    two, one = (json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path / "out"))
    assert two["held_out_accuracy"] == one["held_out_accuracy"]
    assert two["held_out_margin_nats"] == pytest.approx(one["held_out_margin_nats"], abs=1e-4)
    assert two["trained_parameters"] == one["trained_parameters"]
    assert f"wrote {out / 'summary.json'}" in first.out.replace("\n", "")
    assert not GLOO.sub("", second.out).strip()


def test_a_killed_process_ends_the_other_and_the_pair_goes_on_bit_for_bit(hosts, undisturbed, tmp_path):
    out = tmp_path / "out"
    pids = hosts.start(out)
    wait_for(lambda: len(read_metrics(out / "stage-0")) > SAVE_EVERY)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    left = hosts.finish(pids[0])
    assert time.monotonic() - killed < 4 * WAIT
    assert hosts.finish(pids[1]).status == -signal.SIGKILL
    ((status, (line,)),) = errors([left])
    assert status == LOST
    assert line.startswith("error: host 1") and GONE in line
    assert errors(hosts(out)) == [(0, []), (0, [])]
    assert_same_adapters(out, undisturbed[0])
    np.testing.assert_array_equal(losses(out), losses(undisturbed[0]))


def test_the_end_of_the_first_process_is_that_of_the_others(hosts, tmp_path):
    """Also when they are not in a computation, but wait for something else."""
    script = tmp_path / "sleep.py"
    script.write_text(
        "import pathlib, os, time\n\n\ndef get_config():\n    pathlib.Path(f'{os.getpid()}.up').touch()\n    time.sleep(120)\n"
    )
    pids = hosts.start(tmp_path / "out", script=script, folders=(tmp_path, tmp_path))
    wait_for(lambda: len(list(tmp_path.glob("*.up"))) == 2)
    os.kill(pids[0], signal.SIGKILL)
    killed = time.monotonic()
    ((status, (line,)),) = errors([hosts.finish(pids[1])])
    assert time.monotonic() - killed < 4 * WAIT
    assert hosts.finish(pids[0]).status == -signal.SIGKILL
    assert status == LOST
    assert line.startswith("error: host 0, the coordinator at 127.0.0.1:") and GONE in line


def test_sigterm_to_one_saves_on_all_and_another_mesh_goes_on(hosts, undisturbed, tmp_path):
    """Both save the same step; a lone device continues it to the same numbers."""
    out = tmp_path / "out"
    pids = hosts.start(out)
    wait_for((out / "stage-0" / "metrics.jsonl").exists)  # its first step is being compiled
    os.kill(pids[1], signal.SIGTERM)
    ended = [hosts.finish(pid) for pid in pids]
    step = max(int(path.name) for path in (out / "stage-0" / "checkpoints").iterdir())
    assert step < STEPS
    told = f"stopped by SIGTERM after step {step}, saved in {out / 'stage-0'}; run the same command to go on"
    assert errors(ended) == [(143, [told])] * 2
    done = hosts.alone(out, mesh="1,1,1")
    assert done.status == 0, done.err
    assert f"steps {step} to {STEPS}" in done.out
    np.testing.assert_allclose(losses(out), losses(undisturbed[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("missing", "name"), [(0, "host 0, the coordinator at 127.0.0.1:"), (1, "host 1 ")], ids=["first", "second"])
def test_a_missing_host_is_named(hosts, tmp_path, missing, name):
    begun = time.monotonic()
    ((status, (line,)),) = errors(hosts(tmp_path / "out", which=(1 - missing,)))
    assert time.monotonic() - begun < 5 * WAIT
    assert status == LOST
    assert line.startswith(f"error: {name}") and f"did not come within {WAIT} s; start the same command on every host" in line


LOOK = """
import json, sys
from pathlib import Path

import jax
import numpy as np

from meetjax.adapters.bank import init_bank
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.tree import flatten
from meetjax.data.loader import choose_buckets, loader
from meetjax.data.records import read_records
from meetjax.data.tokenize import tokenize_records
from meetjax.models import weights
from meetjax.models.load import load
from meetjax.train.hosts import share_of
from meetjax.train.sharding import base_shardings, make_mesh, put_batch, replicated


def get_config():
    read, sizes = weights._read_leaf, {{}}
    def counted(checkpoint, site, index, dtype):
        part = read(checkpoint, site, index, dtype)
        sizes[site.name] = sizes.get(site.name, 0) + part.size
        return part
    weights._read_leaf = counted
    mesh = make_mesh((1, 8, 1))
    specs = (PromptSpec(3), IdentitySpec())
    model = load({model!r}, shardings=lambda config: base_shardings(config, mesh))
    rows, _ = tokenize_records(read_records({pairs!r}, "pair")[0], model.tokenizer, 64)
    batches = loader(rows, 8, choose_buckets(rows, count=2), 0, *share_of(mesh))
    seen = []
    for _ in range(batches.batches_per_epoch):
        batch, chosen = next(batches)
        placed = put_batch(batch, mesh).tokens
        first = min(shard.index[0].start for shard in placed.addressable_shards)
        for shard in placed.addressable_shards:
            place = shard.index[0].start - first
            np.testing.assert_array_equal(shard.data, batch.tokens[place : place + 1])
        seen.append([int(n) for n in chosen[batch.weights > 0]])
    bank = init_bank(model.config, model.params, specs, model.tokenizer, jax.random.key(0))
    bank = {{path: np.asarray(leaf).ravel()[::7].tolist() for path, leaf in flatten(jax.device_put(bank, replicated(mesh))).items()}}
    found = {{"bank": bank, "fingerprint": model.fingerprint, "seen": seen, "sizes": sizes, "first": first}}
    (Path({out!r}) / f"{{jax.process_index()}}.json").write_text(json.dumps(found))
    sys.exit()
"""


def test_each_process_reads_its_part_of_data_and_weights(hosts, command, model, model_folder, tmp_path):
    """An epoch's rows come once, on one of the two; of every split weight each reads half; adapters made of the weights start alike."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 21)
    script = tmp_path / "look.py"
    script.write_text(LOOK.format(model=str(model_folder), pairs=str(pairs), out=str(tmp_path)))
    assert errors(hosts(tmp_path / "out", script=script)) == [(0, []), (0, [])]
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    rows = [[n for batch in one["seen"] for n in batch] for one in (first, second)]
    assert not set(rows[0]) & set(rows[1])
    assert sorted(rows[0] + rows[1]) == list(range(21))
    assert (first["first"], second["first"]) == (0, 4)
    assert first["fingerprint"] == second["fingerprint"] == model.fingerprint
    for name, leaf in (model.params | model.params["blocks"]).items():
        if name != "blocks":
            assert first["sizes"][name] == second["sizes"][name] == leaf.size // 2, name
    specs = (PromptSpec(3), IdentitySpec())
    bank = flatten(init_bank(model.config, model.params, specs, model.tokenizer, jax.random.key(0)))
    assert first["bank"] == second["bank"] == {path: np.asarray(leaf).ravel()[::7].tolist() for path, leaf in bank.items()}


def test_what_hosts_disagree_on_is_named_on_both(hosts, tmp_path):
    ended = errors(hosts(tmp_path / "out", own=("stages.0.optim.learning_rate=0.5",)))
    found = "error: hosts disagree: recipe: stages.0.optim.learning_rate; expected 0.01 as on host 0; found 0.5 on host 1"
    for status, (line,) in ended:
        assert status == 2 and line.startswith(found)
    assert not (tmp_path / "out").exists()


def test_hosts_with_different_weights_stop(hosts, tmp_path):
    """The same shapes under the same name, of another seed: only the bytes tell them apart."""
    for i in (0, 1):
        write_model(tmp_path / str(i) / "base", seed=i)
    folders = [tmp_path / "0", tmp_path / "1"]
    for status, (line,) in errors(hosts(tmp_path / "out", "model=base", folders=folders)):
        assert status == 2 and line.startswith("error: hosts disagree: base: model.safetensors; expected ")


def test_hosts_with_different_data_stop(hosts, tmp_path):
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
        write_pairs(tmp_path / str(i) / "own.jsonl", 24 + i)
    for status, (line,) in errors(hosts(tmp_path / "out", "data.path=own.jsonl", folders=[tmp_path / "0", tmp_path / "1"])):
        assert status == 2 and line.startswith("error: hosts disagree: data: 0; expected 18 rows, ")


def test_a_folder_that_hosts_do_not_share_stops_them(hosts, tmp_path):
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
    for status, (line,) in errors(hosts("out", folders=[tmp_path / "0", tmp_path / "1"])):
        assert status == 2 and line.startswith("error: out: not one folder for all hosts; found another one on host 1; give an out folder")


def test_a_folder_that_cannot_be_written_is_told_on_both(hosts, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = errors(hosts(tmp_path / "file" / "out"))
    told = f"{tmp_path / 'file' / 'out'}: cannot be written; found Not a directory"
    assert first[0] == second[0] == 2
    assert first[1][0].startswith(f"error: {told}") and second[1][0].startswith(f"error: host 0: {told}")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.batch_size=12", "recipe: train.batch_size; expected a multiple of data x fsdp = 8; found 12"),
        (
            "train.mesh=4,1,1",
            "recipe: train.mesh; expected all 8 devices of 2 hosts; found {'data': 4, 'fsdp': 1, 'model': 1}, none of host 1",
        ),
        ("evaluation.prompts=2", "recipe: on several hosts; expected adapters to train, and evaluation.prompts=0"),
    ],
    ids=["batch", "mesh", "answers"],
)
def test_what_two_hosts_cannot_do_is_told_on_both(hosts, tmp_path, setting, told):
    for status, (line,) in errors(hosts(tmp_path / "out", setting)):
        assert status == 2 and line.startswith(f"error: {told}")
