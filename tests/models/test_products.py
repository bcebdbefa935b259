"""The product with gradients of its own, and attention's: equal to what differentiation gives, and nothing that nobody asked for."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from meetjax.models.attention import _blocks, _cut, attention
from meetjax.models.bits import held, keep, to_bits
from meetjax.models.decoder import apply
from meetjax.models.layers import FEW, lora_deltas
from meetjax.models.layout import MASKED
from meetjax.models.products import dot
from tests.conftest import TINY, assert_close, assert_trees_close, random_bank, random_params

KEYS = jax.random.split(jax.random.key(0), 4)


def plain(x, w):
    return jnp.einsum("...i,io->...o", x, w)


def products_in(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)], ids=str)
def test_gradients_of_a_product(shape):
    """Whichever side is the narrower, and so the transposed, one."""
    x, w, g = (jax.random.normal(key, size) for key, size in zip(KEYS, ((2, 7, shape[0]), shape, (2, 7, shape[1])), strict=False))
    found, expected = (jax.vjp(function, x, w) for function in (dot, plain))
    assert_close(found[0], expected[0])
    assert_trees_close(found[1](g), expected[1](g))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_tokens_get_the_deltas_that_many_get(dtype):
    """Values and gradients of two sites that share x, on either side of the number of tokens where the products change their form."""
    few, many, width = FEW // 2, FEW + 2, 24
    key = jax.random.split(jax.random.key(3), 6)
    x = jax.random.normal(key[0], (2, many, width)).astype(dtype)
    factors = [(jax.random.normal(key[1 + n], (3, width, 4)), jax.random.normal(key[3 + n], (3, 4, 8 + n))) for n in range(2)]
    gates = jax.random.uniform(key[5], (2, 3))

    def total(factors, length):
        deltas = lora_deltas(x[:, :length], factors, gates)
        return sum(jnp.sum(jnp.sin(delta[:, :few].astype(jnp.float32))) for delta in deltas), deltas

    (_, short), grads = jax.value_and_grad(total, has_aux=True)(factors, few)
    (_, long), expected = jax.value_and_grad(total, has_aux=True)(factors, many)
    factor = 1 if dtype == "float32" else 1000
    for ours, theirs in zip(short, long, strict=True):
        assert ours.dtype == jnp.dtype(dtype)
        assert_close(ours.astype(jnp.float32), theirs[:, :few].astype(jnp.float32), factor=factor)
    assert_trees_close(grads, expected, factor=factor)


def test_a_frozen_weight_costs_no_product():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert products_in(jax.grad(lambda x: dot(x, w).sum()), x) == 2
    assert products_in(jax.grad(lambda x, w: dot(x, w).sum(), (0, 1)), x, w) == 3
    assert products_in(jax.grad(lambda w: dot(x, w).sum()), w) == 3  # it does not know that nobody reads the other one; XLA does


def test_a_product_keeps_bfloat16_outside_and_float32_inside():
    x, w = jax.random.normal(KEYS[0], (64, 256), jnp.bfloat16), jax.random.normal(KEYS[1], (256, 8))
    y, pull = jax.vjp(dot, x, w)
    assert y.dtype == jnp.bfloat16
    dx, dw = pull(jnp.ones_like(y))
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert_close(dw, plain(x.astype(jnp.float32).T, jnp.ones((64, 8))))  # a bfloat16 sum would be off in the third digit


def naive_attention(q, k, v, bias):
    groups = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    scores = jnp.einsum("btnh,bnsh->bnts", q, k) / jnp.sqrt(q.shape[3]) + bias
    return jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("lead", [None, 0, 3, 70])
@pytest.mark.parametrize("masked", ["causal", "bias"])
def test_gradients_of_attention(masked, lead):
    """All at once or in blocks, 150 queries; the bias's too: soft-prompt gates enter there. The first `lead` see one key more."""
    q = jax.random.normal(KEYS[0], (2, 150, 4, 8))
    k, v = (jax.random.normal(key, (2, 2, 150, 8)) for key in KEYS[1:3])
    causal = jnp.where(jnp.tril(jnp.ones((150, 150), bool)), 0.0, MASKED)[None, None]
    if masked == "causal":
        found, expected = jax.vjp(lambda *x: attention(*x, None, lead), q, k, v), jax.vjp(lambda *x: naive_attention(*x, causal), q, k, v)
    else:
        seen = causal if not lead else causal.at[:, :, :lead, : lead + 1].set(0.0)
        bias = jax.random.normal(KEYS[3], (2, 1, 150, 150)) + seen
        found, expected = jax.vjp(lambda *x: attention(*x, lead), q, k, v, bias), jax.vjp(naive_attention, q, k, v, bias)
    assert_close(found[0], expected[0])
    assert_trees_close(found[1](q), expected[1](q))


def test_a_query_that_sees_nothing_stays_finite():
    q, k = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 2, 4))
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, jnp.full((1, 1, 2, 2), MASKED)), q, k, k)
    assert all(jnp.isfinite(x).all() for x in (out, *pull(out)))


def test_blocks_of_attention_leave_nothing_out():
    for length, lead in ((1, 0), (64, 0), (65, 0), (150, 70), (40, 60), (5000, 20)):
        blocks = _blocks(length, lead)
        assert [place for block in blocks for place in range(*block)] == list(range(length)) and len(blocks) <= 9
        assert blocks[0][1] >= min(lead + 1, length)
        assert all(_seen(block, length, length) == block[1] for block in blocks)
    assert _blocks(3, None) == ((0, 3),) and _seen((0, 3), 3, 10) == 10


def _seen(block, length, slots):
    q, k = jnp.zeros((1, 1, 1, length, 1)), jnp.zeros((1, 1, slots, 1))
    return _cut(block, q, k, k, None)[1].shape[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_bits_hold_the_value_and_pass_the_gradient(dtype):
    x = jnp.asarray([1.5, -2.0, 0.0], dtype)
    assert (held(to_bits(x), jnp.zeros_like(x)) == x).all()
    for function in (keep, lambda x: held(to_bits(x), x)):
        y, pull = jax.vjp(lambda x, function=function: 3 * function(x), x)
        assert (y == 3 * x).all() and (pull(jnp.ones_like(y))[0] == 3).all()


def test_a_bfloat16_loop_converts_no_stack():
    """XLA's CPU backend turns slices of bfloat16 into slices of float32, of the whole stack at every turn: none is left to it."""
    config = dataclasses.replace(TINY, dtype="bfloat16", remat="dots", layers=5)
    params, tokens = random_params(config), jnp.ones((2, 7), jnp.int32)
    bank = random_bank(config, ("lora",))

    def loss(bank):
        return apply(config, params, tokens, bank).sum()

    compiled = jax.jit(jax.grad(loss)).lower(bank).compile().as_text()
    stacked = re.findall(r"(\w+)\[5,2,7,\d+\]", compiled)
    assert "u16" in stacked and "bf16" not in stacked
