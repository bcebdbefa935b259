"""The table of where leaves live: presets, coverage, and what is never split."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from meetjax.adapters.tree import KINDS, Bank
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.train.optim import make_optimizer
from meetjax.train.sharding import RULES, adapter_shardings, base_shardings, batch_sharding, check_batch, make_mesh, preset, state_shardings
from meetjax.train.stage import Optim
from meetjax.train.step import Parts, init_state
from tests.conftest import TINY, random_bank, random_params

CONFIG = dataclasses.replace(TINY, vocab=98)
MESH = make_mesh((2, 2, 2))


@pytest.mark.parametrize(
    ("name", "devices", "slices", "shape"),
    [
        ("single", 8, 1, (1, 1, 1)),
        ("fsdp", 256, 1, (1, 256, 1)),
        ("fsdp-tensor", 256, 1, (1, 16, 16)),
        ("fsdp-tensor", 1024, 1, (1, 64, 16)),
        ("fsdp-tensor", 6, 1, (1, 3, 2)),
        ("multi-slice", 512, 2, (2, 16, 16)),
        ("multi-slice", 8, 1, (2, 2, 2)),
    ],
)
def test_presets(name, devices, slices, shape):
    assert preset(name, devices, slices) == shape


@pytest.mark.parametrize(("name", "devices"), [("tensor", 8), ("multi-slice", 7)])
def test_bad_preset_raises(name, devices):
    with pytest.raises(MeetjaxError, match=r"recipe: train\.mesh"):
        preset(name, devices)


def test_base_follows_the_table():
    """Widths over fsdp, heads, hidden and vocabulary over model, layers and data never; heads that do not divide stay whole."""
    found = jax.tree.map(lambda place: place.spec, base_shardings(CONFIG, MESH))
    assert found["embed"] == P("model", "fsdp")
    assert found["blocks"]["q"] == P(None, "fsdp", "model")
    assert found["blocks"]["k"] == P(None, "fsdp", "model")
    assert found["blocks"]["down"] == P(None, "model", "fsdp")
    one_key = base_shardings(dataclasses.replace(CONFIG, kv_heads=1), MESH)["blocks"]
    assert (one_key["k"].spec, one_key["q"].spec) == (P(None, "fsdp", None), P(None, "fsdp", "model"))


def test_adapters_follow_their_sites_and_ranks_stay_whole():
    bank = random_bank(CONFIG, KINDS, rank=2)
    found = adapter_shardings(CONFIG, bank, MESH)
    assert found.lora.q.a.spec == P(None, None, "fsdp", None)
    assert found.lora.q.b.spec == P(None, None, None, "model")
    assert found.lora.down.a.spec == P(None, None, "model", None)
    assert found.edit.down.s.spec == P(None, None, "fsdp")
    assert found.identity.block["up"].spec == P(None, None, "fsdp", "model")
    assert found.prompt.vectors.spec == P(None, None, "fsdp")
    assert found.reward.u.spec == P(None, "fsdp")
    jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), bank, found)  # raises unless all divide


def test_every_leaf_of_a_state_is_covered():
    """Moments lie where what they belong to lies, for all kinds and the base; every logical axis has a rule."""
    axes = {axis for leaf in jax.tree.leaves(sites.logical_axes(CONFIG), is_leaf=lambda n: isinstance(n, tuple)) for axis in leaf}
    assert axes <= set(RULES)
    trainable = Parts(random_params(CONFIG), random_bank(CONFIG, KINDS))
    state = jax.eval_shape(lambda: init_state(trainable, make_optimizer(Optim(), 10)))
    places = state_shardings(CONFIG, state, MESH)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    (moments,) = [n for n in jax.tree.leaves(places.opt_state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(n, "mu")]
    assert moments.mu == moments.nu == places.trainable == state_shardings(CONFIG, trainable, MESH)


def test_a_leaf_without_a_rule_raises():
    with pytest.raises(MeetjaxError, match="sharding of extra; expected a leaf of the base, of a bank or of its optimiser"):
        state_shardings(CONFIG, {"extra": jnp.ones(3), "bank": Bank()}, MESH)


def test_batches_that_do_not_divide_raise():
    assert batch_sharding(MESH).spec == P(("data", "fsdp"))
    check_batch(8, MESH, 2)
    with pytest.raises(MeetjaxError, match=r"train\.batch_size; expected a multiple of data x fsdp = 4; found 2"):
        check_batch(2, MESH)
    with pytest.raises(MeetjaxError, match=r"a multiple of data x fsdp x 2 microbatches = 8; found 4"):
        check_batch(4, MESH, 2)
