"""Laws of `apply`: one function whatever the layout of layers, rows, padding, devices and adapter kinds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meetjax.models import sites
from meetjax.models.decoder import apply, unstack
from meetjax.models.layout import branched_rows
from tests.conftest import (
    BATCH,
    DIAL,
    KINDS_ALONE,
    KINDS_TOGETHER,
    LENGTH,
    MOVING,
    TINY,
    TOKENS,
    VARIANTS,
    apart,
    assert_close,
    assert_differs,
    assert_trees_close,
    loss_and_grad,
    quick_forward,
    random_bank,
    random_params,
)

PAD = np.array([0, 2, 1, 4])


@pytest.mark.parametrize("name", ["tied", "qwen2"])
@pytest.mark.parametrize("gates", [KINDS_ALONE, KINDS_TOGETHER], ids=["alone", "together"])
def test_scan_equals_unrolled(name, gates):
    """qwen2 has a window in some layers only: a traced flag in the scan, a constant when unrolled."""
    config = VARIANTS[name]
    params = random_params(config)
    bank = apart(random_bank(config))
    scanned = quick_forward(config, params, TOKENS, bank, gates, dial=DIAL)
    assert_close(quick_forward(config, unstack(params), TOKENS, bank, gates, dial=DIAL), scanned)


def test_vmap_equals_batched(base):
    config, params, _ = base
    bank = apart(random_bank(config))

    def row(params, bank, tokens, gates, dial):
        return apply(config, params, tokens[None], bank, gates[None], dial=dial[None])[0]

    batched = quick_forward(config, params, TOKENS, bank, KINDS_ALONE, dial=DIAL)
    mapped = jax.jit(jax.vmap(row, (None, None, 0, 0, 0)))
    assert_close(mapped(params, bank, TOKENS, KINDS_ALONE, DIAL), batched)


def test_vmap_over_banks_equals_loop(base):
    config, params, _ = base
    banks = [apart(random_bank(config, seed=seed)) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *banks)

    def run(params, bank):
        return apply(config, params, TOKENS, bank, KINDS_ALONE, dial=DIAL)

    mapped = jax.jit(jax.vmap(run, (None, 0)))(params, stacked)
    looped = [quick_forward(config, params, TOKENS, bank, KINDS_ALONE, dial=DIAL) for bank in banks]
    assert_close(mapped, np.stack(looped))
    assert_differs(*looped)


@settings(max_examples=6)
@given(data=st.data())
def test_any_subset_of_kinds_composes(base, data):
    """Rows of one batch under a drawn bank: row 0 off, row 1 under one kind alone, rows 2 and 3 mixed as drawn."""
    config, params, plain = base
    chosen = data.draw(st.sets(st.sampled_from(MOVING), min_size=1), label="kinds")
    count = data.draw(st.integers(1, 3), label="entries")
    shape = {
        "entries": tuple(range(count)),
        "rank": data.draw(st.integers(1, 4), label="rank"),
        "length": data.draw(st.integers(2, 5), label="length"),
        "linear": tuple(data.draw(st.sets(st.sampled_from(sites.LINEAR), min_size=1), label="lora sites")),
        "editable": tuple(data.draw(st.sets(st.sampled_from(sites.EDITABLE), min_size=1), label="edit sites")),
    }
    single = data.draw(st.sampled_from(sorted(chosen)), label="alone")
    whole = random_bank(config, chosen, **shape)
    bank, alone = apart(whole), apart(dataclasses.replace(type(whole)(), **{single: getattr(whole, single)}))
    strengths = st.lists(st.floats(0.25, 1.5, width=32), min_size=count, max_size=count)
    own = list(getattr(bank, single).entries)
    gates = np.zeros((BATCH, len(chosen) * count), np.float32)
    gates[1, own] = data.draw(strengths, label="gates alone")
    gates[2:] = np.array(data.draw(strengths, label="gates together"), np.float32).tolist() * len(chosen)
    logits = np.asarray(quick_forward(config, params, TOKENS, bank, gates))
    assert_close(logits[0], plain[0])
    assert_close(logits[1], quick_forward(config, params, TOKENS, alone, gates[:, own])[1], like=logits)
    assert_differs(logits[1], plain[1])
    if len(chosen) > 1:
        assert_differs(logits[2], quick_forward(config, params, TOKENS, alone, gates[:, own])[2])


def shift_right(tokens, pad, filler):
    """Text behind `pad` tokens of left padding, cut to the same length."""
    rows = [np.concatenate([np.full(n, filler), row[: LENGTH - n]]) for row, n in zip(tokens, pad, strict=True)]
    return np.stack(rows).astype(np.int32)


@pytest.mark.parametrize("gates", [KINDS_ALONE, KINDS_TOGETHER], ids=["alone", "together"])
def test_pad_invariance(variant, gates):
    """Neither the place nor the content of padding reaches a token of the text."""
    config, params = variant
    bank = apart(random_bank(config))
    filled = np.where(np.arange(LENGTH)[None] < LENGTH - PAD[:, None], TOKENS, 0)
    whole, right = (np.asarray(quick_forward(config, params, tokens, bank, gates, dial=DIAL)) for tokens in (TOKENS, filled))
    left = [
        np.asarray(quick_forward(config, params, shift_right(TOKENS, PAD, filler), bank, gates, dial=DIAL, pad=PAD.astype(np.int32)))
        for filler in (0, 1)
    ]
    for row, pad in enumerate(PAD):
        assert_close(right[row, : LENGTH - pad], whole[row, : LENGTH - pad])
        for shifted in left:
            assert_close(shifted[row, pad:], whole[row, : LENGTH - pad])
            assert np.isfinite(shifted).all()


def test_pad_invariance_of_the_base(variant):
    config, params = variant
    whole = np.asarray(quick_forward(config, params, TOKENS))
    left = np.asarray(quick_forward(config, params, shift_right(TOKENS, PAD, 5), pad=PAD.astype(np.int32)))
    for row, pad in enumerate(PAD):
        assert_close(left[row, pad:], whole[row, : LENGTH - pad])


def test_branched_rows_equal_separate_rows(variant):
    """One text that goes on in two ways, in one row, is the two whole texts in rows of their own, soft prompts and all."""
    config, params = variant
    bank = apart(random_bank(config))
    common, ends = np.array([3, 1, 4, 2], np.int32), np.array([[5, 9], [4, 8], [6, 7], [3, 9]], np.int32)
    rows = branched_rows(config, TOKENS, common, ends)
    branched = np.asarray(quick_forward(config, params, TOKENS, bank, KINDS_TOGETHER, dial=DIAL, rows=rows))
    for b in range(BATCH):
        for begin, end in ((common[b], ends[b, 0]), (ends[b, 0], ends[b, 1])):
            whole = np.concatenate([TOKENS[b, : common[b]], TOKENS[b, begin:end]])
            padded = np.pad(whole, (0, LENGTH - len(whole)))[None].repeat(BATCH, 0)
            alone = np.asarray(quick_forward(config, params, padded, bank, KINDS_TOGETHER, dial=DIAL))[b]
            assert_close(branched[b, : common[b]], alone[: common[b]])
            assert_close(branched[b, begin:end], alone[common[b] : len(whole)])


def test_causality(variant):
    """A later token never changes an earlier logit, and does change its own."""
    config, params = variant
    bank = apart(random_bank(config))
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 11) % 97
    before, after = (np.asarray(quick_forward(config, params, t, bank, KINDS_TOGETHER, dial=DIAL)) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert_differs(before[:, 5], after[:, 5])


def test_sliding_window_forgets():
    """With layers of window w, a token is out of reach of positions layers * (w - 1) + 1 later."""
    config = dataclasses.replace(TINY, sliding_window=3, layers=2, bos_token_id=None)
    params = random_params(config)
    changed = TOKENS.copy()
    changed[:, 0] += 1
    before, after = (np.asarray(quick_forward(config, params, tokens)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
    assert_differs(before[:, 4], after[:, 4])


def test_batch_order_invariance(base):
    config, params, _ = base
    bank, order = apart(random_bank(config)), np.array([2, 0, 3, 1])
    straight = quick_forward(config, params, TOKENS, bank, KINDS_ALONE, dial=DIAL)
    shuffled = quick_forward(config, params, TOKENS[order], bank, KINDS_ALONE[order], dial=DIAL[order])
    assert_close(shuffled, np.asarray(straight)[order])


RULES = {"embed": "fsdp", "heads": "model", "kv": "model", "ffn": "model", "vocab": "model", "layers": None}
SHARDED = dataclasses.replace(TINY, vocab=98)
"""98: the vocabulary divides by the model axis."""


def make_mesh(shape, order):
    devices = np.array(jax.devices())[np.array(order)].reshape(shape)
    return Mesh(devices, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def shard_params(params, config, mesh):
    """Each leaf split by the logical axes of `sites` wherever its size divides."""

    def place(leaf, axes):
        names = [RULES[axis] for axis in axes]
        spec = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, leaf.shape, strict=True)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    leaves, tree = jax.tree.flatten(params)
    axes = jax.tree.leaves(sites.logical_axes(config), is_leaf=lambda node: isinstance(node, tuple))
    return jax.tree.unflatten(tree, [place(leaf, names) for leaf, names in zip(leaves, axes, strict=True)])


def run_on(mesh, config=SHARDED):
    """((loss, logits), gradient of the bank) on a mesh: base split, bank replicated, batch over data and fsdp where it divides."""
    params, bank, gates = random_params(config), apart(random_bank(config, entries=(0,))), KINDS_TOGETHER[:, :4]
    if mesh is None:
        return loss_and_grad(bank, params, config, TOKENS, gates)
    axes = ("data", "fsdp") if BATCH % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    with jax.set_mesh(mesh):
        params = shard_params(params, config, mesh)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
        bank = jax.device_put(bank, NamedSharding(mesh, PartitionSpec()))
        tokens, gates = jax.device_put((TOKENS, gates), NamedSharding(mesh, PartitionSpec(axes)))
        return loss_and_grad(bank, params, config, tokens, gates)


@pytest.fixture(scope="module")
def on_one_device():
    return run_on(None)


def assert_same_run(left, right):
    assert_close(left[0][0], right[0][0])
    assert_close(left[0][1], right[0][1])
    assert_trees_close(left[1], right[1])


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_remat_equals_plain(on_one_device, policy):
    """Values and gradients, whatever is kept for the backward pass."""
    config = dataclasses.replace(SHARDED, remat=policy)
    program = str(jax.make_jaxpr(lambda params: apply(config, params, TOKENS))(random_params(config)))
    assert "prevent_cse=False" in program and ("policy=None" in program) == (policy == "full")
    assert_same_run(run_on(None, config), on_one_device)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_sharded_equals_single_device(on_one_device, shape):
    assert float(jnp.abs(on_one_device[1].lora.q.a).max()) > 0
    assert_same_run(run_on(make_mesh(shape, range(8))), on_one_device)


@pytest.mark.parametrize("order", [(7, 6, 5, 4, 3, 2, 1, 0), (3, 0, 6, 1, 7, 4, 2, 5)], ids=str)
def test_mesh_permutation_invariant(on_one_device, order):
    assert_same_run(run_on(make_mesh((2, 2, 2), order)), on_one_device)
