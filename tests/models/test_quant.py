"""The quantised base: what its integers mean, and that every law of the whole base holds on it too."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meetjax.adapters.algebra import merge_model
from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.io import load_adapters, read_manifest, save_adapters
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.merging import linear
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import block_states
from meetjax.models.fingerprint import fingerprint
from meetjax.models.load import load
from meetjax.models.products import dot
from meetjax.models.quant import (
    dequantize_params,
    is_quantized,
    leaf_sharding,
    plain,
    quantize_leaf,
    quantize_params,
    quantized_shapes,
    quantized_shardings,
)
from meetjax.models.save import save_model
from meetjax.train.sharding import base_shardings, make_mesh
from meetjax.train.step import partition
from tests.conftest import (
    DIAL,
    KINDS_TOGETHER,
    TINY,
    TOKENS,
    apart,
    assert_close,
    assert_differs,
    assert_trees_close,
    forward,
    loss_and_grad,
    quick_forward,
    random_bank,
    random_params,
)
from tests.goldens.make_param_names import Ids
from tests.models.test_cache import at_the_same_tokens, decode_all

KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
CONFIG = dataclasses.replace(TINY, vocab=98)
"""98: the vocabulary divides by the model axis of a mesh. 48 hidden features are three tiles of 16, which do not."""
NEAREST = {"int8": 0.0055, "int4": 0.095}
"""|W' - W| / |W| of normal numbers in tiles of 32 that span their range: 4.2 sd / 255 (15) / sqrt(12), and some luck."""
GATES = KINDS_TOGETHER[:, :4]
LLAMA2 = ModelConfig("llama", vocab=32000, width=4096, hidden=11008, layers=2, heads=32, kv_heads=32, head_width=128)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request):
    """(kind, parameters with integers, the numbers that these mean)."""
    params = quantize_params(random_params(CONFIG), request.param)
    return request.param, params, dequantize_params(params)


@KINDS
def test_integers_mean_what_the_formula_says(kind):
    w = np.random.default_rng(0).normal(size=(2, 96, 40)).astype(np.float32)
    made = quantize_leaf(w, kind, 32)
    assert (made.qvalue.shape, made.qvalue.dtype) == (w.shape, jnp.dtype(kind))
    assert made.scale.shape == made.zero_point.shape == (2, 3, 40)
    q, scale, zero = (np.asarray(x.astype(jnp.float32)) for x in (made.qvalue, made.scale, made.zero_point))
    np.testing.assert_array_equal(plain(made), (q - zero.repeat(32, 1)) * scale.repeat(32, 1))
    assert np.linalg.norm(plain(made) - w) < NEAREST[kind] * np.linalg.norm(w)


@KINDS
def test_numbers_on_a_grid_are_exact(kind):
    """Also where a tile is all zeros, all of one sign, or beside one a thousand times larger."""
    low, high = (-128, 127) if kind == "int8" else (-8, 7)
    grid = np.round(np.linspace(low, high, 32)).astype(np.float32)
    w = np.stack([0.25 * grid, np.zeros(32, np.float32), 0.5 * (grid - low), 256 * grid], axis=1)
    np.testing.assert_array_equal(plain(quantize_leaf(np.concatenate([w, w[:, ::-1]])[None], kind, 32))[0], np.concatenate([w, w[:, ::-1]]))


def test_neutral_adapters_are_the_quantised_base_bitwise():
    """All kinds that start as the base; the identity block copies what the integers of block 0 mean."""
    params = quantize_params(random_params(TINY), "int8")
    bank = init_bank(TINY, params, (LoraSpec(rank=2), EditSpec(sites.EDITABLE), IdentitySpec()), Ids(), jax.random.key(3))
    np.testing.assert_array_equal(bank.identity.block["q"][0, 0], plain(params["blocks"]["q"])[0])
    np.testing.assert_array_equal(forward(TINY, params, TOKENS, bank), forward(TINY, params, TOKENS))


def test_same_logits_and_gradients_as_the_numbers_that_it_means(quantised):
    """Every kind on top, scanned and rematerialised: integers are another way to store a weight and nothing else."""
    _, params, whole = quantised
    bank, config = apart(random_bank(CONFIG, entries=(0,))), dataclasses.replace(CONFIG, remat="full")
    (loss, logits), grads = loss_and_grad(bank, params, config, TOKENS, GATES)
    (expected, expected_logits), expected_grads = loss_and_grad(bank, whole, config, TOKENS, GATES)
    assert_close(loss, expected)
    assert_close(logits, expected_logits)
    assert_trees_close(grads, expected_grads)
    assert_differs(logits, loss_and_grad(bank, random_params(CONFIG), config, TOKENS, GATES)[0][1])


def test_prefill_plus_decode_equals_full_forward():
    """Layers apart, each with its cache, against the scan over all of them; every kind on top."""
    params, bank = quantize_params(random_params(CONFIG), "int4"), apart(random_bank(CONFIG, entries=(0,)))
    whole = at_the_same_tokens(quick_forward(CONFIG, params, TOKENS, bank, GATES, dial=DIAL))
    assert_close(decode_all(CONFIG, params, bank, GATES, DIAL), whole)


def test_states_behind_blocks(quantised):
    _, params, whole = quantised
    found, expected = (jax.jit(lambda p: block_states(CONFIG, p, TOKENS, (1, 2)))(tree) for tree in (params, whole))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "shape"), [("int8", (2, 2, 2)), ("int4", (1, 4, 2))], ids=str)
def test_sharded_equals_single_device(kind, shape):
    params, bank, mesh = quantize_params(random_params(CONFIG), kind), random_bank(CONFIG, ("lora",), entries=(0,)), make_mesh(shape)
    gates = GATES[:, :1]
    expected = loss_and_grad(bank, params, CONFIG, TOKENS, gates)
    where = quantized_shardings(CONFIG, kind, base_shardings(CONFIG, mesh))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, where)
        bank = jax.device_put(bank, NamedSharding(mesh, PartitionSpec()))
        found = loss_and_grad(bank, placed, CONFIG, TOKENS, gates)
    q = placed["blocks"]["q"]
    assert not any(leaf.sharding.is_fully_replicated for leaf in (q.qvalue, placed["blocks"]["down"].scale))
    assert_close(found[0][0], expected[0][0])
    assert_close(found[0][1], expected[0][1])
    assert_trees_close(found[1], expected[1])


def test_no_tile_is_cut():
    """11,008 inputs are 344 tiles: 8 devices split them, 16 do not, and then split the outputs instead, or nothing."""
    mesh = jax.sharding.AbstractMesh((4, 8, 16), ("data", "fsdp", "model"))
    for spec, shape, expected in (
        ((None, "model", "fsdp"), (2, 11008, 4096), (None, None, ("fsdp", "model"))),
        ((None, "fsdp", "model"), (2, 11008, 4096), (None, "fsdp", "model")),
        ((None, ("data", "fsdp")), (2, 4096, 11008), (None, ("data", "fsdp"), None)),
        ((None, "model", None), (2, 48, 40), (None, None, None)),
        ((), (2, 48, 40), (None, None, None)),
    ):
        assert leaf_sharding(NamedSharding(mesh, PartitionSpec(*spec)), shape, 32).spec == PartitionSpec(*expected), spec


@KINDS
def test_shapes_are_those_of_the_parameters(kind):
    made = quantize_params(random_params(TINY), kind)
    abstract = quantized_shapes(TINY, kind, jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    blocks = quantized_shapes(LLAMA2, kind)["blocks"]
    size = sum(leaf.size * jnp.finfo(leaf.dtype).bits if leaf.dtype == jnp.bfloat16 else leaf.size * jnp.iinfo(leaf.dtype).bits
               for name in sites.LINEAR for leaf in jax.tree.leaves(blocks[name]))  # fmt: skip
    weights = sum(blocks[name].qvalue.size for name in sites.LINEAR)
    assert size / (16 * weights) == pytest.approx({"int8": 0.529, "int4": 0.289}[kind], abs=1e-3)


def test_load_quantises_what_it_reads(model, model_folder):
    """The identity of a base is that of its weights, however it holds them, and so an adapter fits both; its manifest says which."""
    mesh = make_mesh((2, 2, 2))
    made = load(model_folder, quantize="int8")
    split = load(model_folder, quantize="int8", shardings=lambda config: base_shardings(config, mesh))
    assert made.fingerprint == split.fingerprint == model.fingerprint
    assert (made.quantize, model.quantize) == ("int8", "none")
    expected = quantize_params(model.params, "int8")
    assert {path for path, leaf in made.params["blocks"].items() if is_quantized(leaf)} == set(sites.LINEAR)
    jax.tree.map(np.testing.assert_array_equal, made.params, expected)
    assert_trees_close(dequantize_params(split.params), dequantize_params(expected))
    where = quantized_shardings(made.config, "int8", base_shardings(made.config, mesh))
    for name in sites.LINEAR:
        for part in jax.tree.leaves(split.params["blocks"][name]):
            assert part.sharding.is_equivalent_to(where["blocks"][name], 3), name


def test_adapter_of_either_base_loads_on_the_other(model, tmp_path):
    bank = random_bank(model.config, ("lora",), entries=(0,))
    folder = save_adapters(tmp_path, bank, base=model.name, fingerprint=model.fingerprint, quantize="int8")
    assert read_manifest(folder)["quantize"] == "int8"
    assert_trees_close(load_adapters(folder, model.fingerprint), jax.tree.map(jnp.asarray, bank))


def test_manifest_of_before_is_read(model, tmp_path):
    folder = save_adapters(tmp_path, random_bank(model.config, ("edit",)), base=model.name, fingerprint=model.fingerprint)
    manifest = read_manifest(folder)
    del manifest["quantize"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load_adapters(folder, model.fingerprint)


def test_merged_and_saved_whole(model_folder, tmp_path):
    made = load(model_folder, quantize="int8")
    bank = random_bank(made.config, ("lora",), entries=(0,))
    merged = merge_model(made, bank)
    assert merged.quantize == "none" and not any(map(is_quantized, jax.tree.leaves(merged.params, is_leaf=is_quantized)))
    assert_close(quick_forward(merged.config, merged.params, TOKENS), quick_forward(made.config, made.params, TOKENS, bank), factor=4)
    again = load(save_model(made, tmp_path / "saved"))
    jax.tree.map(np.testing.assert_array_equal, again.params, dequantize_params(made.params))


def test_integers_do_not_train(quantised):
    _, params, _ = quantised
    with pytest.raises(MeetjaxError, match="partition: base; expected whole weights"):
        partition(params, None, kinds=(), base=True)
    w = jax.tree.map(lambda x: x[0], params["blocks"]["q"])
    with pytest.raises(MeetjaxError, match="a quantised weight cannot train"):
        jax.grad(lambda scale: dot(jnp.ones((2, 32)), w.replace(scale=scale)).sum())(w.scale)


def test_what_cannot_be_said_of_integers_is_refused(quantised, model_folder):
    _, params, whole = quantised
    with pytest.raises(MeetjaxError, match="merging: a quantised base"):
        linear([params, params], [0.5, 0.5])
    with pytest.raises(MeetjaxError, match=r"leaf blocks/\w+; expected weights as they were loaded"):
        fingerprint(CONFIG, params)
    with pytest.raises(MeetjaxError, match="argument quantize; expected none or int8 or int4; found nf4"):
        load(model_folder, quantize="nf4")
    narrow = quantize_leaf(whole["blocks"]["q"][:, :, :16], "int8", 32)
    short = whole | {"blocks": whole["blocks"] | {"q": narrow}}
    with pytest.raises(MeetjaxError, match=r"leaf q of a block; expected \(32, 32\); found \(32, 16\)"):
        quick_forward(CONFIG, short, TOKENS)
