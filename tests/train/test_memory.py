"""What a step keeps is chosen from what its compilation says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from meetjax.models.decoder import apply
from meetjax.train import memory
from meetjax.train.memory import choose_remat, compile_step, device_bytes
from tests.conftest import TINY, random_params


@pytest.fixture
def steps():
    """(policy -> step, arguments): the gradient of a tiny model on enough tokens that policies differ in what they need."""
    params, tokens = random_params(TINY), jnp.ones((8, 128), jnp.int32)

    def make(policy):
        config = dataclasses.replace(TINY, remat=policy)
        return jax.jit(jax.grad(lambda params, tokens: apply(config, params, tokens).sum()))

    return make, (params, tokens)


def test_the_fastest_policy_that_fits_is_taken(steps, monkeypatch):
    make, arguments = steps
    needed = {policy: compile_step(make(policy), *arguments).bytes for policy in ("dots", "full")}
    assert needed["full"] < needed["dots"]
    for limit, kept in ((needed["dots"], "dots"), (needed["dots"] - 1, "full"), (0, "full")):
        monkeypatch.setattr(memory, "device_bytes", lambda _, limit=limit: limit)
        _, said = choose_remat("auto", make, arguments, jax.devices()[0])
        assert f"{kept}:" in said and (("does not fit" in said) == (limit < needed["dots"]))


def test_a_policy_that_was_asked_for_is_taken(steps):
    make, arguments = steps
    _, said = choose_remat("none", make, arguments, jax.devices()[0])
    assert said.startswith("remat none: ") and "dots" not in said


def test_what_was_compiled_ahead_is_not_compiled_again(steps):
    make, arguments = steps
    step, count = make("dots"), 0

    def heard(event, duration_secs, **_):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    assert compile_step(step, *arguments).seconds > 0
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        step(*arguments)
        assert count == 0
        step(arguments[0], arguments[1][:4])
        assert count > 0  # or the line above could not fail
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def test_devices_of_a_cpu_share_its_memory():
    assert 0 < device_bytes(jax.devices()[0]) * 8 < 1e15
