"""Hidden states between blocks: those that a loop over blocks would see, and nothing computed behind the last one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from meetjax.adapters.tree import Bank
from meetjax.errors import MeetjaxError
from meetjax.models.decoder import block_states, hidden_states
from meetjax.models.layers import rms_norm
from tests.conftest import BATCH, KINDS_TOGETHER, TINY, TOKENS, assert_close, random_bank, random_params

states = jax.jit(block_states, static_argnums=(0, 3))
normed = jax.jit(hidden_states, static_argnums=0)


@pytest.fixture(scope="module")
def adapted():
    bank = random_bank(TINY, ("lora", "edit", "prompt"))
    return random_params(TINY), bank


def test_taps_are_the_states_of_truncated_models(adapted):
    """h[0] is the embeddings, h[k] what a model of the first k blocks hands to its final norm, adapters and all."""
    params, bank = adapted
    taps = (2, 0, TINY.layers, 1)
    found = states(TINY, params, TOKENS, taps, bank, KINDS_TOGETHER)
    np.testing.assert_array_equal(found[1], params["embed"][TOKENS])
    for tap, state in zip(taps, found, strict=True):
        if tap:
            short = dataclasses.replace(TINY, layers=tap)
            cut = params | {"blocks": jax.tree.map(lambda leaf, k=tap: leaf[:k], params["blocks"])}
            own = Bank(bank.prompt, *(jax.tree.map(lambda leaf, k=tap: leaf[:k], tree) for tree in (bank.lora, bank.edit)))
            assert_close(rms_norm(state, params["norm"], TINY.norm_eps), normed(short, cut, TOKENS, own, KINDS_TOGETHER))


def test_nothing_behind_the_last_tap_is_computed(adapted):
    """A LoRA behind the last tap gets exactly zero gradient, one in front of it does not."""
    params, bank = adapted
    bank = Bank(lora=bank.lora)

    def loss(lora):
        return sum((state**2).sum() for state in block_states(TINY, params, TOKENS, (1, 2), Bank(lora=lora), KINDS_TOGETHER))

    gradient = jax.jit(jax.grad(loss))(bank.lora)
    for leaf in jax.tree.leaves(gradient):
        assert np.asarray(leaf)[:2].any() and not np.asarray(leaf)[2:].any()


def test_impossible_taps_are_told(adapted):
    params, _ = adapted
    for taps in ((TINY.layers + 1,), (-1, 1), (), (0,)):
        with pytest.raises(MeetjaxError, match="taps; expected 0 to 3"):
            block_states(TINY, params, TOKENS, taps)
    with pytest.raises(MeetjaxError, match="no logit dial"):
        block_states(TINY, params, TOKENS, (1,), random_bank(TINY, ("identity",)), np.ones((BATCH, 8), np.float32))
