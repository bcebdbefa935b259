"""`save_model`: what is written is what is read, a folder is there whole or not at all, and nobody's files are overwritten."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors import safe_open

import meetjax.models.save as save_module
from meetjax.adapters.algebra import merge, merge_model
from meetjax.errors import MeetjaxError
from meetjax.models.config import RopeScaling, from_hf, to_hf
from meetjax.models.fingerprint import fingerprint
from meetjax.models.load import Model, load
from meetjax.models.save import save_model, writable
from meetjax.train.sharding import base_shardings
from tests.conftest import CHAT, TINY, TOKENS, VARIANTS, assert_close, build_tokenizer, quick_forward, random_bank, random_params, take

MORE = {
    "linear rope": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 4.0), rope_theta=5e5, max_position=77, norm_eps=1e-6),
    "wide heads": dataclasses.replace(TINY, head_width=16, eos_token_ids=(2, 5), bos_token_id=None),
    "biases everywhere": dataclasses.replace(TINY, biases=("down", "gate", "k", "o", "q", "up", "v")),
    "window everywhere": dataclasses.replace(VARIANTS["qwen2"], window_layers=None, tied_head=True),
    "no window": dataclasses.replace(VARIANTS["qwen2"], sliding_window=None, window_layers=None),
    "mistral without window": dataclasses.replace(VARIANTS["mistral"], sliding_window=None),
}
CONFIGS = VARIANTS | MORE


def make(config, dtype="float32", seed=0):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), random_params(config, seed))
    return Model("tiny", config, params, build_tokenizer(adds_bos=False, chat=CHAT), fingerprint(config, params))


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)), left, right)


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_written_is_what_is_read(name, tmp_path):
    model = make(CONFIGS[name])
    assert save_model(model, tmp_path / "saved") == tmp_path / "saved"
    back = load(tmp_path / "saved")
    assert (back.config, back.fingerprint) == (model.config, model.fingerprint)
    assert_same_bits(back.params, model.params)
    assert os.listdir(tmp_path) == ["saved"]


def test_bfloat16_stays(tmp_path):
    model = make(VARIANTS["llama3"], "bfloat16")
    save_model(model, tmp_path / "saved")
    assert_same_bits(load(tmp_path / "saved", dtype="bfloat16").params, model.params)
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_leaves_of_different_dtypes(tmp_path):
    """A merge in parts: narrow leaves of odd length must not move wide ones from their place."""
    model = make(TINY)
    params = model.params | {"norm": model.params["norm"].astype(jnp.bfloat16), "embed": model.params["embed"][:95]}
    config = dataclasses.replace(TINY, vocab=95)
    save_model(dataclasses.replace(model, config=config, params=params), tmp_path / "saved")
    assert_same_bits(load(tmp_path / "saved").params, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


def test_sharded_model_is_written_whole(tmp_path):
    model = make(TINY)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    save_model(dataclasses.replace(model, params=jax.device_put(model.params, base_shardings(TINY, mesh))), tmp_path / "saved")
    assert_same_bits(load(tmp_path / "saved").params, model.params)


def test_tokenizer_comes_along(tmp_path):
    model = make(TINY)
    save_model(model, tmp_path / "saved")
    tokenizer, messages = load(tmp_path / "saved").tokenizer, [{"role": "user", "content": "the cat"}]
    assert tokenizer("a short answer, 12").input_ids == model.tokenizer("a short answer, 12").input_ids
    assert tokenizer.apply_chat_template(messages, tokenize=False) == model.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["tied", "mistral without window", "no window"])
def test_merged_edits_and_lora_compute_the_same_from_disk(name, tmp_path):
    """An edit adds biases that the format has only together with others: the rest is zero."""
    model = make(CONFIGS[name])
    merged = merge_model(model, take(random_bank(model.config, ("lora", "edit"), editable=("q", "down")), 0))
    assert merged.config.biases == tuple(sorted({"q", "down", *model.config.biases}))
    save_model(merged, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert back.config.model_type == "llama" and back.config.biases == ("down", "gate", "k", "o", "q", "up", "v")
    for path, leaf in back.params["blocks"].items():
        np.testing.assert_array_equal(leaf, merged.params["blocks"].get(path, np.zeros_like(leaf)))
    left, right = (quick_forward(one.config, one.params, TOKENS) for one in (back, merged))
    assert_close(left, right)


def test_merged_lora_keeps_the_config(tmp_path):
    """LoRA adds no leaf, so only the parameters change."""
    model = make(VARIANTS["mistral"])
    config, params = merge(model.config, model.params, take(random_bank(model.config, ("lora",)), 0))
    assert config == model.config
    save_model(dataclasses.replace(model, params=params), tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert back.config == config and back.fingerprint == fingerprint(config, params) != model.fingerprint
    assert_same_bits(back.params, params)


def test_merged_edit_needs_the_config_that_merge_returned(tmp_path):
    model = make(TINY)
    _, params = merge(model.config, model.params, take(random_bank(TINY, ("edit",), editable=("down",)), 0))
    assert "blocks/down_bias" in error_of(lambda: save_model(dataclasses.replace(model, params=params), tmp_path / "saved"))
    assert not list(tmp_path.iterdir())


def test_writable_adds_as_little_as_possible():
    biases = {"down": ("down", "gate", "up"), "v": ("k", "o", "q", "v")}
    for site, group in biases.items():
        assert writable(dataclasses.replace(TINY, biases=(site,))) == dataclasses.replace(TINY, biases=group)
    for config in CONFIGS.values():
        assert writable(config) == config


def test_what_the_format_cannot_say_is_one_line(tmp_path):
    cases = {
        "mistral with a sliding window cannot have these biases": dataclasses.replace(VARIANTS["mistral"], biases=("down",)),
        "cannot say sliding_window": dataclasses.replace(TINY, sliding_window=4),
        "cannot say window_layers": dataclasses.replace(VARIANTS["mistral"], window_layers=(1,)),
        "cannot say rope_scaling": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 4.0, 2.0)),
    }
    for what, config in cases.items():
        assert what in error_of(lambda config=config: save_model(make(config), tmp_path / "saved"))
    wide = dataclasses.replace(make(TINY), params=jax.tree.map(lambda leaf: leaf.astype(np.float16), make(TINY).params))
    assert "float32 or bfloat16" in error_of(lambda: save_model(wide, tmp_path / "saved"))
    assert not list(tmp_path.iterdir())


def test_config_survives_without_what_says_how_to_compute():
    for config in CONFIGS.values():
        assert from_hf(json.loads(json.dumps(to_hf(dataclasses.replace(config, dtype="bfloat16", remat="full"))))) == config


def test_own_folder_is_replaced(tmp_path):
    (tmp_path / "saved").mkdir()  # an empty one is nobody's
    save_model(make(TINY), tmp_path / "saved")
    other = make(VARIANTS["qwen2"], seed=1)
    save_model(other, tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == other.fingerprint
    assert os.listdir(tmp_path) == ["saved"]


def test_nobody_elses_files_are_touched(model_folder, tmp_path):
    model, taken = make(TINY), tmp_path / "taken"
    taken.write_text("a file")
    assert f"{taken}: not a folder" in error_of(lambda: save_model(model, taken))
    assert taken.read_text() == "a file"
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    assert "would be overwritten" in error_of(lambda: save_model(model, model_folder))
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    own = save_model(model, tmp_path / "own")
    (own / "notes.txt").write_text("mine")
    assert "found notes.txt" in error_of(lambda: save_model(model, own))
    link = tmp_path / "link"
    link.symlink_to(own)
    assert "not a folder" in error_of(lambda: save_model(model, link))


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    first = make(TINY)
    save_model(first, tmp_path / "saved")
    poisoned = make(TINY, seed=1)
    poisoned.params["blocks"]["down"][1, 0, 0] = np.nan
    assert "leaf down; expected finite numbers" in error_of(lambda: save_model(poisoned, tmp_path / "saved"))

    def full(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "_write_tensors", full)
        assert "No space left" in error_of(lambda: save_model(make(TINY, seed=1), tmp_path / "saved"))
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(save_module.os, "replace", lambda a, b: full() if a.name.endswith(".partial") else replace(a, b))
        assert "No space left" in error_of(lambda: save_model(make(TINY, seed=1), tmp_path / "saved"))
    assert load(tmp_path / "saved").fingerprint == first.fingerprint
    assert os.listdir(tmp_path) == ["saved"]
