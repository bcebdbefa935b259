"""The SmolLM2 GGUF file as transformers reads it: the same weights bit for bit, and the same token ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from meetjax.data.records import Message
from meetjax.data.template import render_prompt
from meetjax.models import sites
from meetjax.models.hf import tensor_name
from meetjax.models.sources import smollm2_from_wheel
from meetjax.models.weights import transposed

TEXTS = {
    "words": "The quick brown fox doesn't jump over the lazy dog's back; it'll walk.",
    "digits": "In 1984, 3.14159 and 2024-10-11 cost $1,234,567.89 (42%) or 007.",
    "unicode": "Größe naïve 日本語のテキスト العربية Ελληνικά 😀👩‍👩‍👧 e\u0301 \u00a0\u2028x",
    "blanks": "  two\n\n\tthree   \r\n four \n",
    "code": "def f(x):\n    return x**2  # squared\n\n\nprint(f(10))",
    "special": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>tail <|im_start|",
    "empty": "",
}


@pytest.fixture(scope="module")
def file():
    return smollm2_from_wheel()


@pytest.fixture(scope="module")
def their_tokenizer(file):
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_gguf_weights_parity(smollm2, file):
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = {name: leaf.numpy() for name, leaf in model.state_dict().items()}
    seen = {"lm_head.weight"}  # tied: the embedding once more
    np.testing.assert_array_equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])
    for site in sites.top_sites(smollm2.config).values():
        seen.add(tensor_name(site, None))
        np.testing.assert_array_equal(smollm2.params[site.name], theirs[tensor_name(site, None)], err_msg=site.name)
    for site in sites.block_sites(smollm2.config).values():
        for layer, leaf in enumerate(np.asarray(smollm2.params["blocks"][site.name])):
            name = tensor_name(site, layer)
            seen.add(name)
            np.testing.assert_array_equal(leaf.T if transposed(site) else leaf, theirs[name], err_msg=name)
    assert seen == set(theirs)


def test_gguf_config_parity(smollm2, file):
    theirs, ours = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name), smollm2.config
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert np.float32(ours.norm_eps) == np.float32(theirs.rms_norm_eps)
    assert (ours.layers, ours.heads, ours.kv_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.max_position == theirs.max_position_embeddings
    assert theirs.eos_token_id in ours.eos_token_ids


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_gguf_token_ids_parity(smollm2, their_tokenizer, name):
    text = TEXTS[name]
    ours, theirs = smollm2.tokenizer(text)["input_ids"], their_tokenizer(text)["input_ids"]
    assert ours == theirs
    assert smollm2.tokenizer.decode(ours) == their_tokenizer.decode(theirs) == text


def test_gguf_chat_parity(smollm2, their_tokenizer):
    """The chat template of the file, rendered and tokenised."""
    turns = [("system", "Be brief."), ("user", "How many of 12,345 are 😀?"), ("assistant", "None."), ("user", "Why?")]
    text = render_prompt(smollm2.tokenizer, tuple(Message(role, content) for role, content in turns), "chat")
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text == their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smollm2.tokenizer(text)["input_ids"] == their_tokenizer(text)["input_ids"]
    assert smollm2.tokenizer.eos_token_id == their_tokenizer.eos_token_id
