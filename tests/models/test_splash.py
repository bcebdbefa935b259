"""The splash kernel, run in Python, against XLA's attention: every mask of a model, gradients, and a mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meetjax.models.attention as attention_module
from meetjax.errors import MeetjaxError
from meetjax.models.attention import choose_attention
from meetjax.models.decoder import hidden_states
from meetjax.models.layout import branched_rows
from meetjax.models.splash import splash_attention, split
from meetjax.train.sharding import make_mesh
from tests.conftest import TINY, TOKENS, VARIANTS, assert_close, assert_trees_close, random_bank, random_params

ONE = dataclasses.replace(TINY, layers=1, heads=4, kv_heads=2)
PROMPTS = random_bank(ONE, ("prompt",))
GATES = np.array([[1.0, 0.0], [0.3, 0.7], [0.0, 0.0], [1.4, 0.2]], np.float32)
COMMON, ENDS = np.array([3, 2, 4, 3], np.int32), np.array([[6, 8], [5, 9], [6, 8], [4, 7]], np.int32)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(attention_module, "splash_attention", functools.partial(splash_attention, interpret=True))


def run(config, bank, gates, branched, params):
    """(a number that every text state enters, its gradient in params and bank)."""

    def value(params, bank):
        rows = branched_rows(config, jnp.asarray(TOKENS), jnp.asarray(COMMON), jnp.asarray(ENDS)) if branched else None
        states = hidden_states(config, params, jnp.asarray(TOKENS), bank, gates, rows=rows)
        return jnp.mean(states * jnp.asarray(np.random.default_rng(3).normal(size=states.shape), jnp.float32)), states

    return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(params, bank)


@pytest.mark.parametrize("prompted", [False, True], ids=["text", "prompts"])
@pytest.mark.parametrize("branched", [False, True], ids=["apart", "branched"])
def test_splash_equals_xla(prompted, branched):
    """States and gradients, also under gates of 0 and between, absent prompt slots, with and without BOS, and answers behind one prompt."""
    params = random_params(ONE)
    bank, gates = (PROMPTS, jnp.asarray(GATES)) if prompted else (None, None)
    (_, expected), theirs = run(ONE, bank, gates, branched, params)
    (_, found), ours = run(dataclasses.replace(ONE, attention="splash"), bank, gates, branched, params)
    assert_close(found, expected)
    assert_trees_close(ours, theirs)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)], ids=["keys divide", "keys are repeated"])
def test_splash_on_a_mesh_equals_one_device(heads):
    config = dataclasses.replace(ONE, heads=heads[0], kv_heads=heads[1], attention="splash")
    params = random_params(config)
    (_, expected), theirs = run(dataclasses.replace(config, attention="xla"), None, None, True, params)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        (_, found), ours = run(config, None, None, True, params)
    assert_close(found, expected)
    assert_trees_close(jax.tree.map(np.asarray, ours), theirs)


def test_parts_of_a_gate_add_up():
    x = jnp.log(jnp.asarray(np.random.default_rng(0).uniform(1e-3, 2, 100), jnp.float32))
    parts = split(x, "bfloat16")
    assert all(np.array_equal(part, part.astype(jnp.bfloat16).astype(jnp.float32)) for part in parts)
    np.testing.assert_allclose(sum(np.asarray(part, np.float64) for part in parts), x, rtol=2**-23)


def test_the_choice_is_told():
    window = dataclasses.replace(VARIANTS["mistral"], dtype="bfloat16")
    assert choose_attention(TINY, "auto", "tpu", 64)[0] == "splash"
    assert choose_attention(TINY, "auto", "cpu", 64)[0] == "xla"
    assert choose_attention(window, "auto", "tpu", 64) == ("xla", "attention xla: splash needs no sliding window shorter than rows of 64")
    assert choose_attention(window, "auto", "tpu", 5)[0] == "splash"
    assert choose_attention(dataclasses.replace(TINY, dtype="bfloat16"), "cudnn", "gpu", 64)[0] == "cudnn"
    for asked, platform in (("splash", "cpu"), ("cudnn", "tpu"), ("cudnn", "gpu")):
        with pytest.raises(MeetjaxError, match="recipe: attention"):
            choose_attention(TINY, asked, platform, 64)


def test_a_kernel_says_which_mask_it_lacks():
    params = random_params(VARIANTS["mistral"])
    with pytest.raises(MeetjaxError, match="attention: splash; expected no sliding window shorter than 9"):
        hidden_states(dataclasses.replace(VARIANTS["mistral"], attention="splash"), params, jnp.asarray(TOKENS))
    with pytest.raises(MeetjaxError, match=r"attention: cudnn; .* found a soft prompt"):
        hidden_states(dataclasses.replace(ONE, attention="cudnn"), random_params(ONE), jnp.asarray(TOKENS), PROMPTS)


@pytest.mark.parametrize("shape", [(4, 9), (2, 600)], ids=str)
def test_splash_lowers_for_tpu(shape, monkeypatch):
    config = dataclasses.replace(ONE, attention="splash", dtype="bfloat16", head_width=128)
    params, tokens = random_params(config), jax.ShapeDtypeStruct(shape, jnp.int32)
    monkeypatch.setattr(attention_module, "splash_attention", splash_attention)
    made = jax.export.export(jax.jit(lambda *a: hidden_states(config, *a)), platforms=["tpu"])(params, tokens)
    assert "tpu_custom_call" in made.mlir_module()
