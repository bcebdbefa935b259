"""`load` from Hugging Face folders: exact round trips, sharded reading, errors that name tensor and file, the fingerprint."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from meetjax.errors import MeetjaxError
from meetjax.models import hf, sites
from meetjax.models.config import ModelConfig
from meetjax.models.fingerprint import fingerprint, gather_samples
from meetjax.models.load import load
from meetjax.models.weights import place

LLAMA = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False}


def random_checkpoint(raw: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors under the names and in the (out, in) layout of transformers, written out by hand as an oracle."""
    rng = np.random.default_rng(seed)
    width, hidden, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    kv = width // raw["num_attention_heads"] * raw["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(raw["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        if raw["model_type"] == "qwen2":
            block |= {"self_attn.q_proj.bias": (width,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tokenizer(folder) -> None:
    letters = {token: i for i, token in enumerate(["<s>", "</s>", "1", "2", "12", *"abcdefgh"])}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_folder(folder, raw: dict, tensors: dict, files: int = 1):
    """A model folder with one safetensors file, or several and an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def make_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def split(config: ModelConfig, mesh=None) -> dict:
    """Some leaves split over both axes, one over one, the rest replicated."""
    mesh = mesh or make_mesh()
    specs = {
        "q": PartitionSpec(None, "data", "model"),
        "down": PartitionSpec(None, "model", "data"),
        "gate": PartitionSpec(None, None, "model"),
        "embed": PartitionSpec("data", None),
        "head": PartitionSpec("model", "data"),
    }

    def is_shape(node):
        return isinstance(node, tuple)

    paths = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, sites.shapes(config), is_leaf=is_shape)
    return jax.tree.map(lambda name: NamedSharding(mesh, specs.get(name, PartitionSpec())), paths)


def assert_same(left, right) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def error_of(call) -> str:
    with pytest.raises(MeetjaxError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("raw", [LLAMA, QWEN2], ids=["llama-tied", "qwen2-untied"])
def test_values_are_those_of_the_file(tmp_path, raw, files):
    tensors = random_checkpoint(raw)
    model = load(write_folder(tmp_path / "tiny", raw, tensors, files))
    assert model.name == "tiny"
    assert model.config.biases == (("k", "q", "v") if raw is QWEN2 else ())
    assert jax.tree.map(jnp.shape, model.params) == sites.shapes(model.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(model.params["embed"], tensors["model.embed_tokens.weight"])
    assert ("head" in model.params) == (raw is QWEN2)
    if raw is QWEN2:
        np.testing.assert_array_equal(model.params["head"], tensors["lm_head.weight"].T)
        np.testing.assert_array_equal(model.params["blocks"]["k_bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"])
    for layer in range(3):
        block = jax.tree.map(lambda leaf: leaf[layer], model.params["blocks"])  # noqa: B023
        for site, name in {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}.items():
            np.testing.assert_array_equal(block[site], tensors[f"model.layers.{layer}.{name}.weight"].T)
        np.testing.assert_array_equal(block["attn_norm"], tensors[f"model.layers.{layer}.input_layernorm.weight"])
        np.testing.assert_array_equal(block["mlp_norm"], tensors[f"model.layers.{layer}.post_attention_layernorm.weight"])


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casts_every_leaf(tmp_path, stored, dtype):
    tensors = {name: tensor.astype(jnp.dtype(stored)) for name, tensor in random_checkpoint(LLAMA).items()}
    params = load(write_folder(tmp_path / "m", LLAMA, tensors), dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    expected = tensors["model.layers.2.mlp.up_proj.weight"].T.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(params["blocks"]["up"][2]), expected)


def test_harmless_tensors_are_ignored(tmp_path):
    tensors = random_checkpoint(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert "head" not in load(write_folder(tmp_path / "m", LLAMA, tensors)).params


def test_sharded_equals_plain(tmp_path):
    folder = write_folder(tmp_path / "m", QWEN2, random_checkpoint(QWEN2), files=2)
    plain = load(folder)
    shardings = split(plain.config)
    sharded = load(folder, shardings=shardings)
    by_function = load(folder, mesh=make_mesh(), shardings=split)
    jax.tree.map(lambda leaf, sharding: None if leaf.sharding == sharding else pytest.fail(str(leaf.sharding)), sharded.params, shardings)
    assert_same(plain.params, sharded.params)
    assert_same(plain.params, by_function.params)
    assert plain.fingerprint == sharded.fingerprint == by_function.fingerprint


def test_mesh_alone_replicates(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA))
    replicated = load(folder, mesh=make_mesh())
    assert all(leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(replicated.params))
    assert_same(load(folder).params, replicated.params)


def test_every_part_is_read_once_and_alone(tmp_path):
    tensors = random_checkpoint(QWEN2)
    checkpoint = hf.open_folder(write_folder(tmp_path / "m", QWEN2, tensors), "m")
    sizes: dict[str, list[int]] = {}

    def counting(site, layer, index):
        piece = checkpoint.read(site, layer, index)
        sizes.setdefault(hf.tensor_name(site, layer), []).append(piece.size)
        return piece

    place(dataclasses.replace(checkpoint, read=counting), "float32", shardings=split(checkpoint.config))
    assert {name: sum(parts) for name, parts in sizes.items()} == {name: tensor.size for name, tensor in tensors.items()}
    assert sizes["model.layers.1.self_attn.q_proj.weight"] == [16 * 16 // 8] * 8
    assert sizes["model.layers.1.mlp.gate_proj.weight"] == [16 * 32 // 2] * 2
    assert sizes["model.norm.weight"] == [16]


def test_tokenizer_json_is_read_as_it_is(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(folder).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12").input_ids) == ["a", "1", "2"]
    assert tokenizer.eos_token_id == 1


def test_end_tokens_of_generation_config_are_added(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load(folder).config.eos_token_ids == (2, 7)


def test_tensor_errors_name_tensor_and_file(tmp_path):
    good, q = random_checkpoint(LLAMA), "model.layers.1.self_attn.q_proj.weight"
    cases = {
        "is missing": {name: tensor for name, tensor in good.items() if name != q},
        "shape of": good | {q: np.zeros((16, 8), np.float32)},
        "dtype of": good | {q: np.zeros((16, 16), np.int8)},
        "unexpected tensor": good | {"model.layers.3.self_attn.q_proj.weight": good[q]},
    }
    for number, (what, tensors) in enumerate(cases.items()):
        folder = write_folder(tmp_path / str(number), LLAMA, tensors)
        message = error_of(lambda: load(folder))  # noqa: B023
        assert what in message and str(folder) in message and "self_attn.q_proj.weight" in message


def test_untied_config_needs_a_head(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA | {"tie_word_embeddings": False}, random_checkpoint(LLAMA))
    message = error_of(lambda: load(folder))
    assert "lm_head.weight is missing" in message and "tie_word_embeddings" in message


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_cut_file(tmp_path, keep):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in error_of(lambda: load(folder))


def test_index_errors(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA), files=2)
    index, first = folder / "model.safetensors.index.json", folder / "model-00001-of-00002.safetensors"
    good, content = index.read_text(), first.read_bytes()
    for text in ("{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../outside.safetensors"}}'):
        index.write_text(text)
        assert str(index) in error_of(lambda: load(folder))
    moved = json.loads(good)
    moved["weight_map"]["model.norm.weight"] = first.name
    moved["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(moved))
    assert re.search(r"model\.(norm|embed_tokens)\.weight", error_of(lambda: load(folder)))
    index.write_text(good)
    first.unlink()
    assert "no such file" in error_of(lambda: load(folder)) and str(first) in error_of(lambda: load(folder))
    first.write_bytes(content)
    load(folder)


def test_missing_parts(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA))
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in error_of(lambda: load(folder))
    (folder / "model.safetensors").unlink()
    assert "no weights" in error_of(lambda: load(folder))
    (folder / "config.json").unlink()
    assert "config.json" in error_of(lambda: load(folder))


def test_bad_arguments(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, random_checkpoint(LLAMA))
    assert "float32 or bfloat16" in error_of(lambda: load(folder, dtype="float16"))
    config = load(folder).config
    good = split(config)
    blocks = dict(good["blocks"])
    del blocks["down"]
    assert "blocks/down has no entry" in error_of(lambda: load(folder, shardings=good | {"blocks": blocks}))
    assert "head is no leaf" in error_of(lambda: load(folder, shardings=good | {"head": good["embed"]}))
    assert "NamedSharding" in error_of(lambda: load(folder, shardings=good | {"norm": None}))
    uneven = NamedSharding(make_mesh(), PartitionSpec(("data", "model")))
    blocks = dict(good["blocks"]) | {"q": uneven}  # 3 layers over 8 devices
    message = error_of(lambda: load(folder, shardings=good | {"blocks": blocks}))
    assert "blocks/q" in message and "evenly" in message
    other = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    assert "another mesh" in error_of(lambda: load(folder, mesh=other, shardings=good))


def test_fingerprint_survives_cast_and_sharding_but_not_another_base(tmp_path):
    folder = write_folder(tmp_path / "a", LLAMA, random_checkpoint(LLAMA))
    base, half = load(folder), load(folder, dtype="bfloat16", shardings=split)
    assert re.fullmatch(r"[0-9a-f]{64}", base.fingerprint)
    assert base.fingerprint == half.fingerprint
    assert base.fingerprint == fingerprint(base.config, jax.tree.map(np.asarray, base.params))
    assert base.fingerprint == fingerprint(dataclasses.replace(base.config, remat="full", dtype="bfloat16"), base.params)
    assert base.fingerprint != load(write_folder(tmp_path / "b", LLAMA, random_checkpoint(LLAMA, seed=1))).fingerprint
    for leaf in base.params["blocks"]:
        changed = base.params | {"blocks": base.params["blocks"] | {leaf: base.params["blocks"][leaf] * 1.1}}
        assert base.fingerprint != fingerprint(base.config, changed)


def test_fingerprint_rejects_another_tree(tmp_path):
    base = load(write_folder(tmp_path / "a", LLAMA, random_checkpoint(LLAMA)))
    assert "leaf blocks/" in error_of(lambda: fingerprint(dataclasses.replace(base.config, layers=2), base.params))
    without = {name: leaf for name, leaf in base.params.items() if name != "norm"}
    assert "leaf norm" in error_of(lambda: fingerprint(base.config, without))


def test_fingerprint_moves_samples_not_leaves():
    """The gather from a split leaf must not bring the whole leaf to every device."""
    sharding = NamedSharding(make_mesh(), PartitionSpec(None, "data", "model"))
    leaf = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=sharding)
    positions = tuple(np.zeros(256, np.int32) for _ in range(3))
    text = gather_samples.lower({"leaf": leaf}, {"leaf": positions}, sharding.mesh).compile().as_text()
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"= \w+\[([\d,]*)\]\S* all-", text)]
    assert sizes and max(sizes) < 4 * 64 * 64
