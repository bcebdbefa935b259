"""`ModelConfig` from Hugging Face's `config.json`: both spellings of rope, the three families, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig, RopeScaling, from_hf, read_config
from meetjax.models.layers import inverse_frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_llama_fields():
    assert from_hf(LLAMA) == ModelConfig(
        "llama", vocab=100, width=32, hidden=48, layers=3, heads=4, kv_heads=2, head_width=8, bos_token_id=1, eos_token_ids=(2, 3)
    )


def test_config_is_hashable_and_sized():
    config = from_hf(LLAMA)
    assert hash(config) == hash(from_hf(dict(LLAMA)))
    assert config.sizes == {"vocab": 100, "embed": 32, "ffn": 48, "heads": 32, "kv": 16, "layers": 3}


def test_defaults_of_missing_fields():
    raw = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "eos_token_id", "bos_token_id")}
    config = from_hf(raw)
    assert (config.kv_heads, config.head_width, config.eos_token_ids, config.bos_token_id, config.tied_head) == (4, 8, (), None, False)
    assert from_hf(raw | {"eos_token_id": 0}).eos_token_ids == (0,)
    assert from_hf(raw | {"head_dim": 16}).head_width == 16
    assert from_hf(raw | {"tie_word_embeddings": True}).tied_head


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_in_both_spellings(spelling):
    theta = {"rope_theta": 500000.0}
    raw = LLAMA | ({spelling: LLAMA3_ROPE | theta} if spelling == "rope_parameters" else {spelling: LLAMA3_ROPE} | theta)
    config = from_hf(raw)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_rope_linear():
    config = from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    plain = inverse_frequencies(from_hf(LLAMA))
    np.testing.assert_allclose(inverse_frequencies(config), plain / 4, rtol=1e-6)


def test_rope_llama3_keeps_short_waves_and_stretches_long_ones():
    """Wavelengths below 8192 / 4 tokens are kept, those above 8192 / 1 are eight times as long, those between lie between."""
    raw = LLAMA | {"head_dim": 128, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}}
    stretched = inverse_frequencies(from_hf(raw))
    plain = inverse_frequencies(from_hf(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}))
    waves = 2 * np.pi / plain
    short, long = waves < 8192 / 4, waves > 8192
    np.testing.assert_allclose(stretched[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(stretched[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert short.any() and long.any() and between.any()
    assert ((stretched[between] < plain[between]) & (stretched[between] > plain[between] / 8)).all()


def test_mistral_window():
    raw = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
    assert from_hf(raw).sliding_window == 4096
    assert from_hf(raw | {"sliding_window": None}).sliding_window is None
    assert from_hf(raw).window_layers is None


def test_llama_ignores_a_window_that_it_does_not_use():
    assert from_hf(LLAMA | {"sliding_window": 4096}).sliding_window is None


def test_qwen2_biases_and_window():
    raw = LLAMA | {"model_type": "qwen2", "sliding_window": 64}
    assert from_hf(raw).biases == ("k", "q", "v")
    assert from_hf(raw).sliding_window is None
    used = raw | {"use_sliding_window": True}
    assert from_hf(used | {"max_window_layers": 1}).window_layers == (1, 2)
    assert from_hf(used | {"max_window_layers": 0}).window_layers is None
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert from_hf(used | {"layer_types": kinds}).window_layers == (1,)


def test_llama_biases():
    assert from_hf(LLAMA | {"attention_bias": True}).biases == ("k", "o", "q", "v")
    assert from_hf(LLAMA | {"mlp_bias": True}).biases == ("down", "gate", "up")


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_unsupported_rope_scaling_raises(kind):
    message = error_of(lambda: from_hf(LLAMA | {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "some/config.json"))
    assert message.startswith("some/config.json") and kind in message and "default or linear or llama3" in message


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_unknown_model_type_raises(family):
    message = error_of(lambda: from_hf(LLAMA | {"model_type": family}))
    assert "model_type" in message and family in message and "llama or mistral or qwen2" in message


def test_missing_model_type_raises():
    assert "model_type" in error_of(lambda: from_hf({key: value for key, value in LLAMA.items() if key != "model_type"}))


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_field_raises(field):
    raw = {key: value for key, value in LLAMA.items() if key != field}
    assert field in error_of(lambda: from_hf(raw))
    assert field in error_of(lambda: from_hf(raw | {field: "32"}))


@pytest.mark.parametrize("field", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_incomplete_llama3_rope_raises(field):
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != field}
    assert field in error_of(lambda: from_hf(LLAMA | {"rope_scaling": rope}))


def test_kv_heads_not_dividing_raises():
    message = error_of(lambda: from_hf(LLAMA | {"num_key_value_heads": 3}))
    assert "num_key_value_heads" in message and "divisor" in message and "3" in message


def test_other_activation_raises():
    assert "gelu" in error_of(lambda: from_hf(LLAMA | {"hidden_act": "gelu"}))


def test_unknown_remat_raises():
    assert "remat" in error_of(lambda: dataclasses.replace(from_hf(LLAMA), remat="some"))


def test_read_config(tmp_path):
    path = tmp_path / "config.json"
    assert str(path) in error_of(lambda: read_config(path))
    path.write_text('{"model_type": "llama",\n  oops}')
    assert f"{path}:2" in error_of(lambda: read_config(path))
    path.write_text(json.dumps(LLAMA))
    assert read_config(path) == from_hf(LLAMA)
