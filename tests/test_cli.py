"""The command line as a user runs it: what a run leaves behind, and one line for every mistake."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from meetjax.adapters.algebra import stack
from meetjax.adapters.io import load_adapters, read_manifest, save_adapters
from meetjax.cli import main
from tests.conftest import write_model, write_recipe

GENERATE = ("generate", "--prompt", "3 cat?", "--max-new-tokens", "12")


@pytest.fixture
def inside(monkeypatch, capsys):
    """Like `command`, in this process: what takes no time of its own takes no process of its own."""
    level = logging.getLogger("absl").level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["meetjax", *(str(argument) for argument in arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        output = capsys.readouterr()
        return types.SimpleNamespace(status=status, out=output.out, err=output.err)

    yield run
    logging.getLogger("absl").setLevel(level)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A model of the same shape with other weights and without a chat template."""
    return write_model(tmp_path_factory.mktemp("models") / "other", chat=None, seed=1)


def test_align_learns_demonstrations(command, model_folder, tmp_path):
    rows = [{"prompt": f"{n} cat?", "completion": "the mat"} for n in range(24)]
    data = tmp_path / "demonstrations.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(tmp_path, model_folder, objective="Sft()")
    done = command("align", recipe, "--set", f"data.path={data}", "--set", f"out={tmp_path / 'out'}")
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_loss"] < summary["baseline_untrained_loss"]
    assert summary["held_out_n"] == 6


def test_align_writes_a_summary_and_adapters(aligned, model_folder):
    _, out, printed = aligned
    summary = json.loads((out / "summary.json").read_text())
    low, high = summary["held_out_interval"]
    assert 0 <= low <= summary["held_out_accuracy"] <= high <= 1
    assert summary["held_out_n"] == 6
    assert summary["baseline_shorter_accuracy"] == 1.0  # `write_pairs` prefers the short answer
    assert summary["held_out_accuracy"] == 1.0  # and it is learnt within these steps
    adapters = load_file(out / "adapters" / "adapters.safetensors")
    assert summary["trained_parameters"] == sum(leaf.size for leaf in adapters.values())
    assert summary["wall_s"] > 0
    assert 0.1 < summary["peak_rss_gb"] < 8
    assert summary["recipe"]["stages"][0]["optim"]["learning_rate"] == 0.01
    manifest = json.loads((out / "adapters" / "manifest.json").read_text())
    assert manifest["base"] == model_folder.name
    assert manifest["recipe"] == summary["recipe"]
    assert f"{summary['trained_parameters']:,} parameters train" in printed


def test_generate_uses_the_adapter_at_its_strength(aligned, inside, model_folder):
    """Strength 0 says what the base says, strength 1 is the default and says something else."""
    _, out, _ = aligned
    texts = {}
    for options in ((), ("--adapter",), ("--strength", "0"), ("--strength", "1")):
        adapter = ("--adapter", out / "adapters", *options[options == ("--adapter",) :]) if options else ()
        done = inside(*GENERATE, "--model", model_folder, *adapter)
        assert (done.status, done.err) == (0, "")
        texts[options] = done.out
    assert texts["--strength", "0"] == texts[()]
    assert texts["--strength", "1"] == texts["--adapter",]
    assert texts["--strength", "1"] != texts[()]


def test_align_trains_on_demonstrations(model_folder, inside, tmp_path):
    """SFT on the chosen answers of the same pairs, judged on held-out pairs too."""
    file = write_recipe(tmp_path, model_folder, steps=4, trains="EditSpec(),", objective="Sft()")
    done = inside("align", file, "--set", f"out={tmp_path / 'out'}", "--set", "train.microbatches=2")
    assert (done.status, done.err) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_n"] == 6
    assert summary["trained_parameters"] == 2 * 2 * 32


def experiment(folder, model_folder, **options):
    """An experiment file and a folder for its output, as arguments of `align`."""
    return "align", write_recipe(folder, model_folder, steps=4, **options), "--set", f"out={folder / 'out'}"


def with_rows(folder, model_folder, *lines):
    """The same on data of these lines."""
    (folder / "rows.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return *experiment(folder, model_folder), "--set", f"data.path={folder / 'rows.jsonl'}"


PAIR = {"prompt": "a", "chosen": "the cat", "rejected": "the mat"}
DATA = {
    "broken JSON line": ((PAIR, '{"prompt": "a", "cho'), ("rows.jsonl:2: broken JSON; expected one JSON object a line; found ",)),
    "missing column": ((PAIR, {"prompt": "a", "chosen": "b"}), ("rows.jsonl:2", "rejected")),
    "column of another type": ((PAIR, {"prompt": 7, "chosen": "b", "rejected": "c"}), ("rows.jsonl:2", "prompt")),
    "empty answers": (({"prompt": "a", "chosen": " ", "rejected": "b"},) * 3, ("no row is usable", "empty answer", "rows.jsonl:1")),
    "identical pairs": (({"prompt": "a", "chosen": "b", "rejected": "b"},) * 3, ("no row is usable", "identical", "rows.jsonl:1")),
    "no rows": ((), ("rows.jsonl: no rows",)),
    "fewer rows than held out": ((PAIR,) * 3, ("held_out; expected 1 to 2 of 3 rows; found 6",)),
}


def assert_one_line(done, *told):
    """Exit status 2 and, on stderr, one line that holds every string of `told`."""
    assert done.status == 2, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in done.err + done.out
    for part in told:
        assert part in line


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_told_in_one_line(name, inside, model_folder, tmp_path):
    lines, told = DATA[name]
    assert_one_line(inside(*with_rows(tmp_path, model_folder, *lines)), *told)


def test_every_row_filtered_out_is_told_in_one_line(inside, model_folder, tmp_path):
    rows = [{"prompt": str(i), "chosen": "the cat " * 60, "rejected": "the mat"} for i in range(9)]
    done = inside(*with_rows(tmp_path, model_folder, *rows))
    assert_one_line(done, "no row is usable", "an answer does not fit within max_length", "rows.jsonl:")


def test_conversations_without_a_chat_template_are_told_in_one_line(inside, other_model, tmp_path):
    said = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} | said for i in range(9)]
    done = inside(*with_rows(tmp_path, other_model, *rows))
    assert_one_line(done, "a conversation of 1 messages; expected a chat template; found a tokenizer without one")


SETTINGS = {
    "data.path=nowhere.jsonl": "nowhere.jsonl: no such file",
    "data.path=": "recipe: data.path is empty",
    "data.file=x": "--set data.file: field file; expected one of path, split, columns, form, threshold, gap, limit,",
    "data.limit=many": "--set data.limit: value; expected an integer or none; found 'many'",
    "data.template=bogus": "--set data.template: value; expected auto or chat or none; found 'bogus'",
    "train.steps=0": "recipe: train.steps; expected >= 1; found 0",
    "train.mesh=3,3,3": "recipe: train.mesh; expected (data, fsdp, model) with a product of 1 to 8 devices; found (3, 3, 3)",
    "train.microbatches=3": "recipe: train.microbatches; expected a divisor of train.batch_size = 4; found 3",
    "dtype=float16": "--set dtype: value; expected float32 or bfloat16; found 'float16'",
    "stages.1.optim.clip=0": "--set stages.1.optim.clip: index 1; expected 0 to 0; found 1",
    "stages.0.trains.0.sites=q,nose": "lora: unknown site nose; expected some of q, k, v, o, gate, up, down; found q, nose",
    "stages.0.trains.0.rank=0": "lora: rank; expected >= 1; found 0",
    "data.max_length=257": "recipe: data.max_length; expected at most 256, the positions of tiny; found 257",
    "model=nobody": "model 'nobody'; expected a model folder, a .gguf file, a hub id",
    "train.steps": "--set train.steps; expected field=value; found no =",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_bad_settings_are_told_in_one_line(setting, inside, model_folder, tmp_path):
    assert_one_line(inside(*experiment(tmp_path, model_folder), "--set", setting), SETTINGS[setting])


RECIPES = {
    "zero trainable leaves": ("", "stages.0.trains: zero trainable leaves; expected base or some of prompt, lora, edit, identity"),
    "unknown kind": (
        '"rola",',
        "stages.0.trains.0; expected a PromptSpec or a LoraSpec or an EditSpec or an IdentitySpec or a RewardSpec or base; found 'rola'",
    ),
    "kind given twice": (
        "EditSpec(), EditSpec(),",
        "adapters; expected one spec a kind: prompt, lora, edit, identity, reward; found EditSpec(",
    ),
    "a spec that does not exist": ("RolaSpec(),", "recipe.py:14: cannot be run; found NameError: name 'RolaSpec' is not defined"),
    "a field of another type": ('LoraSpec(rank="8"),', "recipe: stages.0.trains.0.rank; expected an integer; found '8'"),
    "broken Python": ("EditSpec(", "recipe.py:9: cannot be run; found SyntaxError"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_experiments_are_told_in_one_line(name, inside, model_folder, tmp_path):
    trains, told = RECIPES[name]
    assert_one_line(inside(*experiment(tmp_path, model_folder, trains=trains)), told)


def test_experiment_file_without_a_recipe_is_told_in_one_line(inside, tmp_path):
    file = tmp_path / "mine.py"
    assert_one_line(inside("align", file), f"{file}: no such file; expected an experiment with get_config()")
    file.write_text("x = 1\n")
    assert_one_line(inside("align", file), f"{file}: get_config(); expected a function that returns a Recipe; found NoneType")
    file.write_text("x = 1\nraise OSError('no network')\n")
    assert_one_line(inside("align", file), f"{file}:2: cannot be run; found OSError: no network")


def test_another_base_is_told_in_one_line(aligned, other_model, inside):
    """Neither the adapter nor the checkpoint of one base is used on another."""
    file, out, _ = aligned
    done = inside(*GENERATE, "--model", other_model, "--adapter", out / "adapters")
    assert_one_line(done, f"{out / 'adapters'}: adapter of another base; expected base tiny (", "load the base it was trained on")
    done = inside("align", file, "--set", f"out={out}", "--set", f"model={other_model}")
    assert_one_line(done, f"{out / 'stage-0' / 'checkpoints'}: checkpoint of another run: fingerprint; expected ")
    done = inside("align", file, "--set", f"out={out}", "--set", "train.steps=49")
    assert_one_line(done, "checkpoint of another run: recipe.train.steps; expected 48; found 49; choose another out folder")


def test_truncated_files_are_told_in_one_line(aligned, model_folder, inside, tmp_path):
    _, out, _ = aligned
    broken = write_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_line(inside(*GENERATE, "--model", broken), f"{weights}: not a whole safetensors file; found ")
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 5, 5))
    assert_one_line(inside(*GENERATE, "--model", gguf), f"{gguf}: not a whole GGUF file; found ")
    adapter = tmp_path / "adapters"
    adapter.mkdir()
    for name in ("manifest.json", "adapters.safetensors"):
        (adapter / name).write_bytes((out / "adapters" / name).read_bytes())
    (adapter / "adapters.safetensors").write_bytes((out / "adapters" / "adapters.safetensors").read_bytes()[:-100])
    done = inside(*GENERATE, "--model", model_folder, "--adapter", adapter)
    assert_one_line(done, f"{adapter / 'adapters.safetensors'}: not a whole safetensors file; found ")


OPTIONS = {
    ("--strength", "0.5"): "--strength or --dial without an adapter; name one with --adapter DIR",
    ("--adapter", "nowhere"): "nowhere/manifest.json: no such file; expected an adapter folder",
    ("--temperature", "-1"): "sampling: temperature; expected >= 0 and finite; found -1.0",
    ("--top-p", "0"): "sampling: top_p; expected in (0, 1]; found 0.0",
    ("--seed", "-1"): "sampling: seed; expected 0 to 2^31 - 1; found -1",
    ("--max-new-tokens", "0"): "max_new_tokens; expected >= 1; found 0",
    ("--max-new-tokens", "250"): "prompt: too long; expected prompt + max_new_tokens <= 256 tokens; found 15 + 250; shorten the prompt",
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_bad_options_of_generate_are_told_in_one_line(options, inside, model_folder):
    assert_one_line(inside(*GENERATE, "--model", model_folder, *options), OPTIONS[options])


def test_bad_strengths_are_told_in_one_line(aligned, inside, model_folder, tmp_path):
    adapter = (*GENERATE, "--model", model_folder, "--adapter", aligned[1] / "adapters")
    assert_one_line(inside(*adapter, "--strength", "nan"), "gates: value; expected finite numbers; found")
    assert_one_line(inside(*adapter, "--dial", "inf"), "dial: value; expected finite numbers; found")
    assert_one_line(inside(*adapter, "--dial", "1", "--strength", "1"), "--strength and --dial; expected one of them; found both")
    bank, manifest = load_adapters(aligned[1] / "adapters"), read_manifest(aligned[1] / "adapters")
    save_adapters(tmp_path / "two", stack([bank, bank]), base=manifest["base"], fingerprint=manifest["fingerprint"])
    two = (*GENERATE, "--model", model_folder, "--adapter", tmp_path / "two")
    assert_one_line(inside(*two), "strength; expected 2, one for each gate column of the adapter; found 1; 0 for all but one")
    assert_one_line(inside(*two, "--dial", "1"), "generate: --dial; expected an adapter of one gate column; found 2 columns")


def test_a_system_message_without_a_chat_template_is_told_in_one_line(inside, other_model):
    assert_one_line(inside(*GENERATE, "--model", other_model, "--system", "be brief"), "expected a chat template")


def test_an_output_folder_that_cannot_be_made_is_told_in_one_line(inside, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = experiment(tmp_path, model_folder)[:2]
    assert_one_line(inside(*arguments, "--set", f"out={tmp_path / 'file' / 'out'}"), f"{tmp_path / 'file' / 'out'}")


def test_debug_shows_a_traceback(inside):
    done = inside("align", "nowhere.py", "--debug")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: nowhere.py: no such file")


def test_help_names_every_command(inside):
    done = inside("--help")
    assert done.status == 0
    assert all(name in done.out for name in ("align", "generate", "chat", "sweep", "export", "import", "demo", "selftest"))


def test_installed_command(tmp_path):
    """The console script in a process of its own, not a fork."""
    script = Path(sys.executable).parent / "meetjax"
    done = subprocess.run([script, "align", tmp_path / "nowhere.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nowhere.py'}: no such file")
