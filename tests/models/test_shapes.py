"""Names, shapes and counts: golden files for tiny models, published numbers for full-size ones, without one byte of weights."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec, init_identity
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.tree import count_parameters
from meetjax.models import sites
from meetjax.models.config import from_hf
from meetjax.models.decoder import apply, init_params, unstack
from tests.conftest import VARIANTS
from tests.goldens.make_param_names import GOLDEN, Ids, describe


def hf_config(family, vocab, width, hidden, layers, heads, kv_heads, **more):
    return from_hf(
        {
            "model_type": family,
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
        | more
    )


MODELS = {
    "Llama-2-7B": hf_config("llama", 32000, 4096, 11008, 32, 32, 32),
    "Llama-2-70B": hf_config("llama", 32000, 8192, 28672, 80, 64, 8),
    "Mistral-7B": hf_config("mistral", 32000, 4096, 14336, 32, 32, 8),
    "Llama-3.1-8B": hf_config("llama", 128256, 4096, 14336, 32, 32, 8),
    "Llama-3.2-3B": hf_config("llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "Qwen2.5-7B": hf_config("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Qwen2.5-1.5B": hf_config("qwen2", 151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
}
PARAMETERS = {  # as counted in the published checkpoints
    "Mistral-7B": 7_241_732_096,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-1.5B": 1_543_714_304,
}
IDENTITY_BLOCKS = {  # one decoder block, as CLM counts its trainable parameters (arXiv 2503.04346)
    "Llama-3.1-8B": 218_112_000,
    "Qwen2.5-7B": 233_057_792,
    "Llama-3.2-3B": 100_669_440,
    "Qwen2.5-1.5B": 46_797_824,
}


def abstract_params(config):
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def abstract_bank(config, *specs, columns=1):
    return jax.eval_shape(lambda params: init_bank(config, params, specs, Ids(), jax.random.key(0), columns), abstract_params(config))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_golden_param_names(name):
    assert describe(VARIANTS[name]) == json.loads(GOLDEN.read_text())[name]


def test_init_params_is_the_tree_of_sites(tiny):
    config, params = tiny
    assert jax.tree.map(lambda leaf: leaf.shape, params) == sites.shapes(config)
    axes = sites.logical_axes(config)
    assert jax.tree.structure(axes, is_leaf=lambda node: isinstance(node, tuple)) == jax.tree.structure(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    flat = unstack(params)
    assert sorted(flat) == ["block_0", "block_1", "block_2", "embed", "norm"]
    assert (flat["block_2"]["up"] == params["blocks"]["up"][2]).all()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_parameter_counts(name):
    assert count_parameters(abstract_params(MODELS[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["Llama-2-7B", "Llama-2-70B"])
def test_full_size_eval_shape(name):
    """The whole forward of a full-size model under a bank of every kind, traced without allocating it."""
    config = MODELS[name]
    bank = abstract_bank(config, PromptSpec(length=20), LoraSpec(rank=16), EditSpec(), IdentitySpec())
    rows, length = 2, 128
    tokens, gates, dial = (jax.ShapeDtypeStruct(s, t) for s, t in (((rows, length), "int32"), ((rows, 1), "float32"), ((rows,), "float32")))
    logits = jax.eval_shape(
        lambda params, bank, tokens, gates, dial: apply(config, params, tokens, bank, gates, dial=dial),
        abstract_params(config),
        bank,
        tokens,
        gates,
        dial,
    )
    assert (logits.shape, logits.dtype) == ((rows, length, 32000), jnp.float32)


def test_published_adapter_counts():
    config = MODELS["Llama-2-7B"]
    assert count_parameters(abstract_bank(config, LoraSpec(rank=16, sites=("q", "v")))) == 8_388_608
    assert count_parameters(abstract_bank(config, EditSpec())) == 262_144
    assert count_parameters(abstract_bank(config, EditSpec(sites=sites.EDITABLE))) == 2 * 32 * 5 * 4096
    # MEET's controls, two classes (arXiv 2310.00819, with our lengths and ranks)
    assert count_parameters(abstract_bank(config, PromptSpec(length=20), columns=2)) == 163_840
    assert count_parameters(abstract_bank(config, LoraSpec(rank=8, sites=("q", "v")), columns=2)) == 2 * 4_194_304


@pytest.mark.parametrize(
    ("name", "sft", "dpo"), [("Llama-2-7B", 33_554_432, 39_976_960), ("Mistral-7B", 27_262_976, 41_943_040)], ids=["llama", "mistral"]
)
def test_trade_off_adapter_counts(name, sft, dpo):
    """The two adapter shapes of the trade-off study (arXiv 2406.04879, table 6): rank 64 on q, v and rank 16 on all linear sites."""
    assert count_parameters(abstract_bank(MODELS[name], LoraSpec(rank=64, sites=("q", "v")))) == sft
    assert count_parameters(abstract_bank(MODELS[name], LoraSpec(rank=16))) == dpo


@pytest.mark.parametrize("name", sorted(IDENTITY_BLOCKS))
def test_published_identity_block_counts(name):
    config = MODELS[name]
    block = jax.eval_shape(lambda params: init_identity(config, params, IdentitySpec()), abstract_params(config))
    assert count_parameters(block) == IDENTITY_BLOCKS[name]
