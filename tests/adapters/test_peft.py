"""Adapters in peft's files, without peft: names, exact round trips, every pattern of rank and alpha, and one line for what is not plain."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from meetjax.adapters.peft import CONFIG, WEIGHTS, lora_from_peft, lora_to_peft, read_peft, write_peft
from meetjax.errors import MeetjaxError
from tests.conftest import TINY, random_bank, take

LORA = take(random_bank(TINY, ("lora",), linear=("q", "down"), rank=3), 0)
PROMPT = take(random_bank(TINY, ("prompt",)), 0)
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def written(tmp_path):
    """(folder of a LoRA, function that changes its config)."""
    write_peft(tmp_path, LORA, TINY, "tiny")

    def change(**fields):
        (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | fields))

    return tmp_path, change


def test_names_and_round_trip():
    state = lora_to_peft(LORA.lora)
    assert len(state) == 2 * 2 * TINY.layers
    a = state["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    b = state["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"]
    assert a.shape == (3, TINY.width) and b.shape == (TINY.width, 3)
    assert all(tensor.flags.c_contiguous for tensor in state.values())
    np.testing.assert_array_equal(a, np.asarray(LORA.lora.q.a[2, 0]).T)
    assert_same(lora_from_peft(state, scale=1.5), LORA.lora)


def test_tensors_that_are_no_lora_raise():
    assert "bank of 2" in error_of(lambda: lora_to_peft(random_bank(TINY, ("lora",)).lora))
    state = lora_to_peft(take(random_bank(TINY, ("lora",), linear=("q",)), 0).lora)
    path = Q.format("A")
    missing = {name: tensor for name, tensor in state.items() if name != path}
    assert "q" in error_of(lambda: lora_from_peft(missing, 1.0))
    for foreign in (path.replace("q_proj", "qkv_proj"), path.replace("lora_A", "lora_magnitude_vector"), "x", "model.layers.a.b.c.lora_A"):
        assert foreign in error_of(lambda foreign=foreign: lora_from_peft(state | {foreign: state[path]}, 1.0))


@pytest.mark.parametrize("bank", [LORA, PROMPT], ids=["lora", "prompt"])
def test_files_round_trip(bank, tmp_path):
    write_peft(tmp_path, bank, TINY, "tiny")
    assert_same(read_peft(tmp_path, TINY), bank)


def test_ranks_and_alphas_by_pattern(written):
    """Of two patterns the first that fits counts, and a pattern fits the end of a path; what differs goes into b, exactly."""
    folder, change = written
    state = load_file(folder / WEIGHTS)
    state[Q.format("A")], state[Q.format("B")] = state[Q.format("A")][:2].copy(), state[Q.format("B")][:, :2].copy()
    save_file(state, folder / WEIGHTS)
    change(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 6, "q_proj": 12.0}, lora_alpha=9.0)
    found = read_peft(folder, TINY).lora
    products = {site: np.asarray(getattr(found, site).a @ getattr(found, site).b) * found.scale for site in ("q", "down")}
    for site, layer, rank, scale in (("q", 0, 3, 4.0), ("q", 1, 2, 3.0), ("down", 1, 3, 3.0)):
        own = getattr(LORA.lora, site)
        expected = scale * np.asarray(own.a[layer, 0, :, :rank] @ own.b[layer, 0, :rank])
        np.testing.assert_allclose(products[site][layer, 0], expected, rtol=1e-5, atol=1e-6)


def test_rank_stabilised_scale(written):
    folder, change = written
    change(use_rslora=True)
    assert read_peft(folder, TINY).lora.scale == pytest.approx(1.5 * 3 / 3**0.5)


def test_layers_left_alone_are_zero(written):
    folder, _ = written
    save_file({name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".layers.2." not in name}, folder / WEIGHTS)
    found = read_peft(folder, TINY).lora
    assert found.q.a.shape[0] == TINY.layers and not found.q.b[2].any()
    np.testing.assert_array_equal(found.q.b[:2], LORA.lora.q.b[:2])


REFUSED = {
    "use_dora": (True, "use_dora; expected not set; found True; merge it into its base with peft"),
    "bias": ("lora_only", "bias; expected none; found lora_only"),
    "modules_to_save": (["lm_head"], "modules_to_save; expected not set"),
    "init_lora_weights": ("pissa", "init_lora_weights; expected a start that leaves the base alone; found pissa"),
    "peft_type": ("IA3", "peft_type; expected LORA or PROMPT_TUNING; found IA3"),
    "a_setting_of_tomorrow": (7, "a_setting_of_tomorrow; expected not set; found 7"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_plain_is_refused(field, written):
    folder, change = written
    value, told = REFUSED[field]
    change(**{field: value})
    assert told in error_of(lambda: read_peft(folder, TINY))


def test_broken_folders_are_told(written):
    folder, _ = written
    state = load_file(folder / WEIGHTS)
    save_file(state | {Q.format("A"): state[Q.format("A")][:2].copy()}, folder / WEIGHTS)
    assert "layer 1; expected two factors of one rank" in error_of(lambda: read_peft(folder, TINY))
    wide = {name: np.pad(t, ((0, 0), (0, 1))) if name.endswith("q_proj.lora_A.weight") else t for name, t in state.items()}
    save_file(wide, folder / WEIGHTS)
    assert "LoRA at q; expected (32, 32), as the base; found (33, 32)" in error_of(lambda: read_peft(folder, TINY))
    save_file({}, folder / WEIGHTS)
    assert "no LoRA tensor" in error_of(lambda: read_peft(folder, TINY))
    (folder / WEIGHTS).write_bytes(b"no")
    assert "not a whole safetensors file" in error_of(lambda: read_peft(folder, TINY))
    (folder / WEIGHTS).unlink()
    assert "safe_serialization" in error_of(lambda: read_peft(folder, TINY))
    (folder / CONFIG).write_text("[]")
    assert "not a PEFT config" in error_of(lambda: read_peft(folder, TINY))
    assert "no such file" in error_of(lambda: read_peft(folder / "nowhere", TINY))


def test_soft_prompts_of_another_shape_are_refused(tmp_path):
    write_peft(tmp_path, PROMPT, TINY, "tiny")
    vectors = np.asarray(PROMPT.prompt.vectors[0])
    for broken in (vectors[:3], vectors[:, :8], vectors * 0, vectors * np.nan):
        save_file({"prompt_embeddings": np.ascontiguousarray(broken)}, tmp_path / WEIGHTS)
        assert "prompt_embeddings" in error_of(lambda: read_peft(tmp_path, TINY))


def test_only_lora_and_prompts_are_written(tmp_path):
    message = error_of(lambda: write_peft(tmp_path, random_bank(TINY, ("edit",)), TINY, "tiny"))
    assert message == "PEFT export; expected a LoRA or a soft prompt; found neither"
    assert not list(tmp_path.iterdir())
