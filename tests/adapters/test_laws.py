"""Laws of the bank: zero is neutral, one is the adapter, rows are independent, and gradients go where they should."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec, init_identity
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec, init_prompt
from meetjax.adapters.tree import Bank, EditSite, Prompt, check_gates, columns, flatten
from meetjax.errors import MeetjaxError
from meetjax.models import layers, sites
from meetjax.models.attention import make_attend
from meetjax.models.layout import make_layout, text_rows
from tests.conftest import (
    BATCH,
    DIAL,
    KINDS_ALONE,
    KINDS_TOGETHER,
    LENGTH,
    MOVING,
    ROUNDING,
    TINY,
    TOKENS,
    VARIANTS,
    apart,
    assert_close,
    assert_differs,
    forward,
    loss_and_grad,
    quick_forward,
    random_bank,
    random_params,
    take,
)
from tests.goldens.make_param_names import Ids

NEUTRAL = {
    "lora": (LoraSpec(rank=2),),
    "edit": (EditSpec(sites.EDITABLE),),
    "identity": (IdentitySpec(),),
    "all": (LoraSpec(rank=2), EditSpec(), IdentitySpec()),
}
"""What starts as the base bit for bit. A soft prompt starts from words, so it moves the model at once."""
GATES = np.array([[1, 0], [0, 1], [0.6, 0.3], [1.4, 0.2]], np.float32)


@pytest.mark.parametrize(("specs", "dtype"), [("lora", "float32"), ("edit", "float32"), ("identity", "float32"), ("all", "bfloat16")])
def test_neutral_adapter_is_base_bitwise(base, specs, dtype):
    """A freshly made adapter, in the program a user compiles: adding 0 and multiplying by 1 change no bit."""
    config, params, _ = base
    config = dataclasses.replace(config, dtype=dtype)
    bank = init_bank(config, params, NEUTRAL[specs], Ids(), jax.random.key(3))
    np.testing.assert_array_equal(forward(config, params, TOKENS, bank), forward(config, params, TOKENS))


def test_none_equals_neutral(base):
    """None, a bank of nothing and a dial without a bank are one program; empty prompts and idle streams are the base up to rounding."""
    config, params, plain = base
    np.testing.assert_array_equal(forward(config, params, TOKENS, None), plain)
    np.testing.assert_array_equal(forward(config, params, TOKENS, Bank()), plain)
    np.testing.assert_array_equal(forward(config, params, TOKENS, None, None, dial=np.ones(BATCH, np.float32)), plain)
    empty = Bank(prompt=Prompt(jnp.zeros((1, 4, config.width))))
    assert_close(quick_forward(config, params, TOKENS, empty), plain)
    idle = init_bank(config, params, NEUTRAL["all"], Ids(), jax.random.key(3))
    assert_close(quick_forward(config, params, TOKENS, idle, 0.7 * np.ones((BATCH, 1), np.float32)), plain)


@pytest.mark.parametrize("beside", [(), ("lora",)], ids=["alone", "beside lora"])
def test_reward_head_changes_no_logit(base, beside):
    """Bit for bit, whatever the head holds; nor has it a part in the streams of a dial."""
    config, params, plain = base
    bank = random_bank(config, (*beside, "reward"))
    without = forward(config, params, TOKENS, random_bank(config, beside), GATES) if beside else plain
    np.testing.assert_array_equal(forward(config, params, TOKENS, bank, GATES), without)
    assert_close(quick_forward(config, params, TOKENS, Bank(reward=bank.reward), dial=DIAL), plain)


@pytest.mark.parametrize("kind", MOVING)
def test_gate_zero_is_base(base, kind):
    """Exactly for what acts inside a block; up to rounding where columns or streams join the sums."""
    config, params, plain = base
    bank, exact = random_bank(config, (kind,)), kind in ("lora", "edit")
    off = (forward if exact else quick_forward)(config, params, TOKENS, bank, np.zeros((BATCH, 2), np.float32))
    if exact:
        np.testing.assert_array_equal(off, plain)
    assert_close(off, plain)
    assert_differs(quick_forward(config, params, TOKENS, bank, GATES), plain)


@pytest.mark.parametrize("kind", [*MOVING, "all"])
def test_gate_one_is_adapter(base, kind):
    """Gate 1 is the adapter without gates, and a one-hot gate in a bank of two is the one adapter alone."""
    config, params, plain = base
    bank = random_bank(config, MOVING if kind == "all" else (kind,))
    logits = np.asarray(quick_forward(config, params, TOKENS, bank, GATES))
    for row in (0, 1):
        alone = np.asarray(quick_forward(config, params, TOKENS, take(bank, row)))
        assert_close(logits[row], alone[row])
        assert_differs(logits[row], plain[row])


def test_mix_is_linear_in_delta():
    """What a kind adds inside a block is linear in its gates, exactly as w1 delta1 + w2 delta2."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    x, a, b, s, t, gates = normal(4, 5, 8), normal(2, 8, 3), normal(2, 3, 6), normal(2, 8), normal(2, 8), normal(4, 2)
    one_hot = [jnp.tile(row[None], (4, 1)) for row in jnp.eye(2)]
    parts = [layers.lora_deltas(x, [(a, b)], hot)[0] for hot in one_hot]
    expected = sum(gates[:, i, None, None] * part for i, part in enumerate(parts))
    assert_close(layers.lora_deltas(x, [(a, b)], gates)[0], expected)
    parts = [layers.edit_output(x, s, t, hot) - x for hot in one_hot]
    expected = sum(gates[:, i, None, None] * part for i, part in enumerate(parts))
    assert_close(layers.edit_output(x, s, t, gates) - x, expected)


def test_lora_mixing_is_not_interpolation_of_factors():
    """(a1 + a2)(b1 + b2) has the cross terms a1 b2 + a2 b1, which mixing must not have."""
    draw = np.random.default_rng(0)
    x, a, b = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((1, 2, 8), (2, 8, 3), (2, 3, 6)))
    mixed = layers.lora_deltas(x, [(a, b)], jnp.full((1, 2), 0.5))[0]
    assert_close(mixed, x @ (0.5 * a[0] @ b[0] + 0.5 * a[1] @ b[1])[None])
    assert_differs(mixed, x @ (a.mean(0) @ b.mean(0))[None])


@pytest.mark.parametrize("kind", ["prompt", "lora", "edit", "identity", "all"])
def test_per_row_equals_loop(base, kind):
    """A batch with other gates on every row is each row run alone under its own."""
    config, params, _ = base
    bank = random_bank(config, MOVING if kind == "all" else (kind,))
    whole = np.asarray(quick_forward(config, params, TOKENS, bank, GATES))
    for row in range(BATCH):
        if kind == "all":
            alone = quick_forward(config, params, TOKENS[row : row + 1], bank, GATES[row : row + 1])[0]
        else:
            alone = quick_forward(config, params, TOKENS, bank, np.tile(GATES[row], (BATCH, 1)))[row]
        assert_close(whole[row], alone)


@pytest.mark.parametrize("name", ["tied", "mistral", "qwen2"])
def test_prompt_from_embeddings_equals_tokens(name):
    """A soft prompt of the embeddings of some tokens is those tokens, after a leading BOS, else in front."""
    config = VARIANTS[name]
    params, words = random_params(config), [11, 12, 13]
    bank = Bank(prompt=init_prompt(params, PromptSpec(length=5), [words]))
    ids = [11, 12, 13, 11, 12]
    texts, kept = [], []
    for row in TOKENS:
        head = int(config.bos_token_id is not None and row[0] == config.bos_token_id)
        texts.append([*row[:head], *ids, *row[head:]])
        kept.append([*range(head), *range(head + 5, LENGTH + 5)])
    expected = np.asarray(quick_forward(config, params, np.array(texts, np.int32)))
    soft = quick_forward(config, params, TOKENS, bank)
    assert_close(soft, np.stack([logits[keep] for logits, keep in zip(expected, kept, strict=True)]))
    assert_differs(soft, quick_forward(config, params, TOKENS))


def test_prompt_gate_weighs_attention(base):
    """Gate g on a prompt column multiplies its unnormalised attention weight by g: two gates of 1/2 on twins are one gate of 1."""
    config, params, _ = base
    one = random_bank(config, ("prompt",), entries=(0,))
    twins = Bank(prompt=Prompt(jnp.concatenate([one.prompt.vectors] * 2), (0, 1)))
    halves = np.full((BATCH, 2), 0.5, np.float32)
    assert_close(quick_forward(config, params, TOKENS, twins, halves), quick_forward(config, params, TOKENS, one))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*sorted(VARIANTS), "biased"])
def test_identity_block_is_identity(name, dtype):
    """phi(h) = h elementwise for hidden states of any size, on whatever linear sites the base has biases."""
    config = VARIANTS.get(name) or dataclasses.replace(TINY, biases=("down", "k", "o", "q", "v"))
    params = random_params(config)
    block = {name: leaf[0, 0] for name, leaf in init_identity(config, params, IdentitySpec()).block.items()}
    h = jnp.asarray(100 * np.random.default_rng(0).normal(size=(BATCH, LENGTH, config.width)), dtype)
    attend = make_attend(make_layout(config, text_rows(config, jnp.asarray(TOKENS))))
    gates = layers.Gates(None, None)
    run = jax.jit(lambda h: layers.block(config, block, h, None, None, gates, attend)[0])
    np.testing.assert_array_equal(np.asarray(run(h)), np.asarray(h))


def test_ffn_that_is_edited_away_adds_nothing(base):
    """RED stands in front of the residual sum: scale and bias 0 on `down` are a model whose FFNs say nothing, attention untouched."""
    config, params, _ = base
    bank = random_bank(config, ("edit",), entries=(0,), editable=("down",))
    site = bank.edit.down
    off = Bank(edit=dataclasses.replace(bank.edit, down=EditSite(-jnp.ones_like(site.s), jnp.zeros_like(site.t))))
    silent = params | {"blocks": params["blocks"] | {"down": jnp.zeros_like(params["blocks"]["down"])}}
    assert_close(quick_forward(config, params, TOKENS, off), quick_forward(config, silent, TOKENS))


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_identity_block_copies_the_layer_it_is_told(base, layer):
    """Every tensor but W_o and W_down is that layer's, in each of n blocks; a layer that is not there is refused."""
    config, params, _ = base
    made = init_identity(config, params, IdentitySpec(blocks=2, layer=layer)).block
    for name, leaf in made.items():
        expected = np.zeros_like(params["blocks"][name][layer]) if name in ("o", "down") else params["blocks"][name][layer]
        for n in range(2):
            np.testing.assert_array_equal(leaf[n, 0], expected)
    for wrong in (config.layers, -config.layers - 1):
        with pytest.raises(MeetjaxError, match=f"identity: layer; expected -{config.layers} to {config.layers - 1}; found {wrong}"):
            init_identity(config, params, IdentitySpec(layer=wrong))


def test_first_gradient_reaches_every_kind(base):
    """At initialisation only zeros can move: b of LoRA, s and t of an edit, o and down of an identity block, and a prompt's vectors.

    Their partners wait: a LoRA's a for its b, everything upstream of an identity block's W_o and W_down for those two.
    """
    config, params, _ = base
    specs = (LoraSpec(rank=2), EditSpec(), PromptSpec(length=3), IdentitySpec())
    bank = init_bank(config, params, specs, Ids(), jax.random.key(0))
    _, grad = loss_and_grad(bank, params, config, TOKENS, np.ones((BATCH, 1), np.float32))
    still = {path for path, leaf in flatten(grad).items() if not float(jnp.abs(leaf).max()) > 0}
    upstream = set(bank.identity.block) - {"o", "down"}
    assert still == {f"lora/{name}/a" for name in sites.LINEAR} | {f"identity/block/{name}" for name in upstream}


def test_edit_gradients():
    """dL/ds = sum over rows and tokens of gate * dL/dh2 * h1 and dL/dt the same without h1, s and t anywhere."""
    draw = np.random.default_rng(0)
    h1, upstream = (jnp.asarray(draw.normal(size=(3, 5, 8)), jnp.float32) for _ in range(2))
    s, t, gates = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((2, 8), (2, 8), (3, 2)))
    _, pull = jax.vjp(lambda s, t: layers.edit_output(h1, s, t, gates), s, t)
    grad_s, grad_t = pull(upstream)
    assert_close(grad_s, np.einsum("be,btd,btd->ed", gates, upstream, h1))
    assert_close(grad_t, np.einsum("be,btd->ed", gates, upstream))


def test_gradient_of_a_closed_gate_is_zero(base):
    """MEET: an entry whose gate is 0 on every row gets exactly no gradient, its neighbour gets some."""
    config, params, _ = base
    bank = random_bank(config)
    gates = np.stack([np.linspace(0.5, 1.5, BATCH), np.zeros(BATCH)], axis=1).astype(np.float32)
    _, grad = loss_and_grad(bank, params, config, TOKENS, gates)
    for path, leaf in flatten(grad).items():
        axis = 0 if path.startswith("prompt") else 1
        open_gate, closed_gate = jnp.take(leaf, 0, axis), jnp.take(leaf, 1, axis)
        assert float(jnp.abs(closed_gate).max()) == 0, path
        assert float(jnp.abs(open_gate).max()) > 0, path


def test_class_gates_train_each_adapter_on_its_own_rows(base):
    """MEET: with one-hot rows, an entry's gradient is that of the loss over its rows alone."""
    config, params, _ = base
    bank = random_bank(config)
    first, second = (np.tile(np.array(hot, np.float32), (BATCH, 1)) for hot in ([1, 0], [0, 1]))
    rows = np.array([True, False, False, True])[:, None]
    _, mixed = loss_and_grad(bank, params, config, TOKENS, np.where(rows, first, second))
    other = TOKENS.copy()
    other[1:3] = 50
    _, changed = loss_and_grad(bank, params, config, other, np.where(rows, first, second))
    for path, leaf in flatten(mixed).items():
        axis = 0 if path.startswith("prompt") else 1
        again, scale = flatten(changed)[path], float(jnp.abs(leaf).max())
        assert_close(jnp.take(again, 0, axis) / scale, jnp.take(leaf, 0, axis) / scale)
        assert float(jnp.abs(jnp.take(again, 1, axis) - jnp.take(leaf, 1, axis)).max()) > 100 * ROUNDING * scale, path


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_site_raises(base):
    config, params, _ = base
    make = lambda spec: init_bank(config, params, (spec,), Ids(), jax.random.key(0))  # noqa: E731
    assert "qq" in error_of(lambda: make(LoraSpec(sites=("q", "qq")))) and "q, k, v, o, gate, up, down" in error_of(
        lambda: make(LoraSpec(sites=("qq",)))
    )
    assert "gate" in error_of(lambda: make(EditSpec(sites=("gate",))))
    assert "no site" in error_of(lambda: make(LoraSpec(sites=())))
    with pytest.raises(TypeError, match="w_q"):
        type(random_bank(config, ("lora",)).lora)(w_q=None)


def test_zero_trainable_raises(base):
    config, params, _ = base
    assert "zero trainable" in error_of(lambda: init_bank(config, params, (), Ids(), jax.random.key(0)))


@pytest.mark.parametrize(
    ("specs", "word"),
    [
        ((LoraSpec(rank=0),), "rank"),
        ((IdentitySpec(blocks=0),), "blocks"),
        ((PromptSpec(length=0),), "prompt"),
        ((EditSpec(), EditSpec(("o",))), "one spec a kind"),
        (("lora",), "one spec a kind"),
    ],
    ids=["rank", "blocks", "length", "twice", "not a spec"],
)
def test_bad_specs_raise(base, specs, word):
    config, params, _ = base
    assert word in error_of(lambda: init_bank(config, params, specs, Ids(), jax.random.key(0)))


def test_check_gates(base):
    bank = apart(random_bank(base[0]))
    assert columns(bank) == 8
    check_gates(bank, KINDS_TOGETHER, BATCH)
    check_gates(bank, KINDS_ALONE, BATCH)
    check_gates(None, None, BATCH)
    assert "(4, 8)" in error_of(lambda: check_gates(bank, KINDS_TOGETHER[:, :3], BATCH))
    assert "(3, 8)" in error_of(lambda: check_gates(bank, KINDS_TOGETHER, 3))
    assert "finite" in error_of(lambda: check_gates(bank, np.where(KINDS_TOGETHER > 1, np.inf, KINDS_TOGETHER), BATCH))
    assert "finite" in error_of(lambda: check_gates(bank, np.where(KINDS_TOGETHER > 1, np.nan, KINDS_TOGETHER), BATCH))
    assert ">= 0" in error_of(lambda: check_gates(bank, -KINDS_TOGETHER, BATCH))
    assert "bank" in error_of(lambda: check_gates(None, KINDS_TOGETHER, BATCH))
