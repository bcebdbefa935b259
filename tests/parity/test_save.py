"""A folder that meetjax wrote, read by transformers: the same logits and the same tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

import meetjax
from meetjax.adapters.algebra import merge_model
from meetjax.models.fingerprint import fingerprint
from meetjax.models.load import Model
from meetjax.models.save import save_model
from tests.conftest import CHAT, TOKENS, VARIANTS, build_tokenizer, random_bank, random_params, take

TINY_ERROR = 1e-5
"""Of the largest logit: three layers in float32 differ only in the order of sums of at most 48 numbers."""

forward = jax.jit(meetjax.apply, static_argnums=0)


def check(model, folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_model(model, folder), attn_implementation="eager").eval()
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS.astype(np.int64)), use_cache=False).logits.numpy()
    found = np.asarray(forward(model.config, model.params, TOKENS))
    assert np.abs(found - expected).max() <= TINY_ERROR * np.abs(expected).max()
    return theirs


def make(config):
    params = random_params(config)
    return Model("tiny", config, params, build_tokenizer(adds_bos=True, chat=CHAT), fingerprint(config, params))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_transformers_reads_what_is_written(name, tmp_path):
    model = make(VARIANTS[name])
    theirs = check(model, tmp_path / "saved")
    assert type(theirs).__name__.lower() == f"{model.config.model_type}forcausallm"
    assert theirs.config.bos_token_id == model.config.bos_token_id
    assert theirs.config.eos_token_id == (list(model.config.eos_token_ids) or None)
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), "a short answer, 12"
    assert tokenizer(text).input_ids == model.tokenizer(text).input_ids
    messages = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == model.tokenizer.apply_chat_template(messages, tokenize=False)


def test_transformers_reads_a_merged_adapter(tmp_path):
    """LoRA and RED in the weights; the biases that RED adds to `down` bring zeros for the other sites."""
    model = make(VARIANTS["llama3"])
    theirs = check(merge_model(model, take(random_bank(model.config, ("lora", "edit"), editable=("down",)), 0)), tmp_path / "saved")
    assert theirs.config.mlp_bias and not theirs.config.attention_bias
