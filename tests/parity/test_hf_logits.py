"""Logits against transformers: SmolLM2 on the same weights, and tiny random models of every supported family through a folder on disk."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import meetjax
from meetjax.data.tokenize import answer_ids
from meetjax.generate.decode import generate_tokens
from meetjax.generate.sampling import RowSampling
from meetjax.models.config import RopeScaling
from meetjax.models.decoder import unstack

TINY_ERROR = 1e-5
"""Of the largest logit: three layers in float32 differ only in the order of sums of at most 48 numbers."""
SMOLLM2_ERROR = 1e-4
"""Of the largest logit: the same rounding, carried through 30 layers and sums of 1,536 numbers."""
FEATURE = 1e-2
"""What a model without its special feature differs by at least; the tolerance above would be empty otherwise."""

ROWS, LENGTH, WINDOW, NEW = 4, 40, 6, 16
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
NO_SCALING = {"rope_scaling": RopeScaling()}
FAMILIES = {  # name -> (transformers config, what it sets, the fields of ModelConfig that switch its special feature off)
    "llama_untied": (transformers.LlamaConfig, {}, {"rope_theta": 100.0}),
    "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}, {"norm_eps": 0.1}),
    "llama_heads_alike": (transformers.LlamaConfig, {"num_key_value_heads": 4, "head_dim": 16}, {"rope_theta": 100.0}),
    "llama_biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}, {"rope_theta": 100.0}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}, NO_SCALING),
    "llama_linear": (transformers.LlamaConfig, {"rope_parameters": LINEAR}, NO_SCALING),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}, {"rope_theta": 100.0}),
    "qwen2_tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}, {"rope_theta": 100.0}),
    "qwen2_windowed": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"window_layers": None},
    ),
}

CACHED = ("llama3", "mistral", "qwen2_windowed")
"""Families whose positions or windows a cache could get wrong."""

forward = jax.jit(meetjax.apply, static_argnums=0)


def relative_error(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().numpy().astype(np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@functools.cache
def make_family(name, folder):
    """(transformers model, meetjax model read from the folder that it wrote, fields that switch its feature off)."""
    config_type, settings, without = FAMILIES[name]
    theirs = transformers.AutoModelForCausalLM.from_config(config_type(**SHAPE | settings), dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # Wide enough for attention to choose; norms are not 1 and biases not 0, as they are after `from_config`.
        for name, leaf in theirs.named_parameters():
            leaf.copy_(0.25 * torch.randn(leaf.shape, generator=draw) + ("norm" in name))
    folder = folder / name
    theirs.save_pretrained(folder, max_shard_size="20KB")  # several files and an index
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return theirs.eval(), meetjax.load(folder), without


@pytest.fixture(params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def tokens():
    """int32[4, 40], no padding, end or start token in them but a BOS in front of two rows."""
    drawn = np.random.default_rng(5).integers(3, SHAPE["vocab_size"], (ROWS, LENGTH)).astype(np.int32)
    drawn[:2, 0] = SHAPE["bos_token_id"]
    return drawn


def left_padded(tokens, pads):
    """(tokens behind `pads` columns of padding, attention mask, positions that count from the first real token)."""
    padded, mask = np.array(tokens), np.ones(tokens.shape, np.int64)
    for row, pad in enumerate(pads):
        padded[row, :pad], mask[row, :pad] = 0, 0
    return padded, mask, np.maximum(mask.cumsum(1) - 1, 0)


def their_logits(model, tokens, mask=None, positions=None):
    """float32[B, T, V] of a transformers model."""
    more = {} if mask is None else {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False, **more).logits


def test_hf_logits_parity(family, tokens):
    theirs, ours, without = family
    expected = their_logits(theirs, tokens)
    assert relative_error(forward(ours.config, ours.params, tokens), expected) <= TINY_ERROR
    plain = dataclasses.replace(ours.config, **without)
    assert plain != ours.config
    assert relative_error(forward(plain, ours.params, tokens), expected) > FEATURE


def test_hf_logits_parity_left_padded(family, tokens):
    theirs, ours, _ = family
    pads = np.array([0, 1, 9, LENGTH - 3], np.int32)
    padded, mask, positions = left_padded(tokens, pads)
    expected = their_logits(theirs, padded, mask, positions)
    found = np.asarray(forward(ours.config, ours.params, padded, pad=jnp.asarray(pads)))
    real = mask.astype(bool)
    assert relative_error(found[real], expected[torch.from_numpy(real)]) <= TINY_ERROR


@pytest.mark.parametrize("family", CACHED, indirect=True)
def test_greedy_parity_of_unequal_lengths(family, tokens):
    """Prefill and cached decode, rows padded right, against transformers' own, padded left (its window forgets keys)."""
    theirs, ours, _ = family
    pads = np.array([0, 1, 9, LENGTH - 3], np.int32)
    padded, mask, _ = left_padded(tokens, pads)
    with torch.no_grad():
        ids = torch.from_numpy(padded.astype(np.int64))
        expected = theirs.generate(
            ids, attention_mask=torch.from_numpy(mask), do_sample=False, max_new_tokens=NEW, eos_token_id=2, pad_token_id=0
        )
    greedy = RowSampling(jnp.zeros(ROWS), jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS), jnp.zeros(ROWS, jnp.int32))
    right = np.stack([np.roll(row, -pad) for row, pad in zip(padded, pads, strict=True)])
    found, counts = generate_tokens(ours.config, unstack(ours.params), right, jnp.asarray(LENGTH - pads), greedy, max_new_tokens=NEW)
    for row, count in enumerate(np.asarray(counts)):
        assert found[row, :count].tolist() == expected[row, LENGTH : LENGTH + count].tolist()
        assert count == NEW or found[row, count - 1] == SHAPE["eos_token_id"]


def test_smollm2_logits_parity(smollm2, torch_smollm2, pairs):
    """On real dialogues, right-padded (padding follows the text, so no mask) and left-padded."""
    _, rows = pairs
    texts = [answer_ids(rows, n, 0) for n in range(len(rows))]
    width = max(len(ids) for ids in texts)
    pads = np.array([width - len(ids) for ids in texts], np.int32)
    right = np.stack([np.pad(ids, (0, pad)) for ids, pad in zip(texts, pads, strict=True)])
    left = np.stack([np.pad(ids, (pad, 0)) for ids, pad in zip(texts, pads, strict=True)])
    theirs = torch_smollm2()
    real = np.arange(width)[None] < (width - pads)[:, None]
    expected = their_logits(theirs, right)[torch.from_numpy(real)]
    found = np.asarray(forward(smollm2.config, smollm2.params, right))[real]
    assert relative_error(found, expected) <= SMOLLM2_ERROR
    assert (found.argmax(-1) == expected.argmax(-1).numpy()).all()
    _, mask, positions = left_padded(left, pads)
    expected = their_logits(theirs, left, mask, positions)[torch.from_numpy(mask.astype(bool))]
    found = np.asarray(forward(smollm2.config, smollm2.params, left, pad=jnp.asarray(pads)))[mask.astype(bool)]
    assert relative_error(found, expected) <= SMOLLM2_ERROR
