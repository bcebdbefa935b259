"""Starting on several hosts: what JAX is told or finds, and launch files that say what they should, without a cluster at hand."""

from __future__ import annotations

import itertools
import math
import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from meetjax.errors import MeetjaxError
from meetjax.launch import LOST, _in_cluster, join_hosts, why_it_ended
from meetjax.train.stage import Recipe, override

FOLDER = Path(__file__).parent.parent / "experiments" / "launch"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("10.0.0.1:99", None, None), "--coordinator, --processes and --process together"),
        (("10.0.0.1", 2, 0), "--coordinator; expected HOST:PORT of process 0; found 10.0.0.1"),
        (("10.0.0.1:99", 2, 2), "--process; expected 0 to 1, for --processes 2; found 2"),
    ],
)
def test_flags_that_do_not_fit_are_told(flags, told):
    with pytest.raises(MeetjaxError, match=told):
        join_hosts(*flags)


def test_a_time_limit_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("MEETJAX_HOST_TIMEOUT", "soon")
    with pytest.raises(MeetjaxError, match="MEETJAX_HOST_TIMEOUT; expected seconds, more than 0; found soon"):
        join_hosts("127.0.0.1:99", 2, 0)


def test_slurm_is_recognised_and_a_lone_task_stays_alone(monkeypatch):
    assert not _in_cluster()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert _in_cluster()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not _in_cluster()
    assert not join_hosts()


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("... Some timed out task names:\n2\n5\n\n\nRPC: /xla.coordination.CoordinationService/RegisterTask", "hosts 2 and 5 did not come"),
        ("DEADLINE_EXCEEDED\nRPC: /xla.coordination.CoordinationService/RegisterTask", "host 0, the coordinator at a:1, did not come"),
        ("unhealthy (stopped sending heartbeats):\n3\nThe tasks have crashed.", "host 3 is gone"),
        ("UNAVAILABLE: Socket closed", "host 0, the coordinator at a:1, is gone"),
    ],
)
def test_last_words_of_the_runtime_become_a_line(log, told):
    assert str(why_it_ended(log, "a:1")).startswith(told)


def settings(arguments):
    """The recipe that the `--set` of these arguments make, whose fields must exist."""
    given = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    assert given and arguments.count("--set") == len(given)
    return override(Recipe("any"), given)


def run(script, *arguments, path=None, **environment):
    search = os.pathsep.join([*([str(path)] if path else []), os.environ["PATH"]])
    return subprocess.run(["bash", script, *arguments], env=os.environ | {"PATH": search} | environment, capture_output=True, text=True)


@pytest.fixture
def stubs(tmp_path):
    """`stubs(name, status)` makes a command that notes its arguments in `calls` and ends with this status."""

    def make(name, status=0):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path / "calls"}\nexit {status}\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "bin", tmp_path / "calls"

    return make


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_scripts_are_bash(name):
    assert subprocess.run(["bash", "-n", FOLDER / name], capture_output=True, text=True).stderr == ""


def test_a_dry_run_of_the_tpu_script_says_what_it_would_do(stubs):
    path, calls = stubs("gcloud")
    arguments = ("pod", "z", "v5litepod-16", "v2", "10.0.0.2:/runs", "experiments/lora_dpo_hh.py", "--set", "data.path=/mnt/a b.jsonl")
    done = run(FOLDER / "tpu_vm.sh", "--dry-run", *arguments, path=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not calls.exists()
    assert "tpu-vm create pod --zone z --accelerator-type v5litepod-16 --version v2" in done.stdout
    assert "tpu-vm scp /tmp/meetjax.tar.gz pod:/tmp/ --zone z --worker=all" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("gcloud compute tpus tpu-vm ssh pod --zone z --worker=all --command ")
    # What the shell of a host gets, once this shell has taken the quotes off.
    (command,) = subprocess.run(["bash", "-c", f"printf '%s\\0' {last}"], capture_output=True, text=True).stdout.split("\0")[-2:-1]
    assert command.strip() == r"cd ~/meetjax && .venv/bin/meetjax align experiments/lora_dpo_hh.py --set data.path=/mnt/a\ b.jsonl"
    assert run(FOLDER / "tpu_vm.sh", "pod", "z").returncode == 2


def test_the_jobset_starts_the_recipe_on_all_chips_and_again_after_a_loss():
    jobset = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["parallelism"] == spec["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:2] == ["meetjax", "align"]
    assert (FOLDER.parent.parent / container["command"][2]).is_file()
    recipe = settings(container["command"])
    assert math.prod(recipe.train.mesh) == job["replicas"] * chips
    assert recipe.train.batch_size % (recipe.train.mesh[0] * recipe.train.mesh[1]) == 0
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert recipe.out.startswith(mounts["runs"] + "/") and {volume["name"] for volume in pod["volumes"]} == set(mounts)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (
        rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2] and rule["onExitCodes"]["containerName"] == container["name"]
    )
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0  # what a podFailurePolicy asks for
    assert jobset["spec"]["failurePolicy"]["rules"][0] == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (LOST, True), (143, True)])
def test_a_slurm_job_goes_on_after_what_can_pass(stubs, status, again):
    stubs("scontrol")
    path, calls = stubs("srun", status)
    done = run(FOLDER / "slurm.sbatch", "experiments/lora_dpo_hh.py", "--set", "out=runs/hh", path=path, SLURM_JOB_ID="7")
    assert done.returncode == status
    expected = ["srun .venv/bin/meetjax align experiments/lora_dpo_hh.py --set out=runs/hh", *(["scontrol requeue 7"] if again else [])]
    assert calls.read_text().splitlines() == expected
    options = [line.split()[1] for line in (FOLDER / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--ntasks-per-node=4" in options and "--gpus-per-node=4" in options, "a process a GPU"
