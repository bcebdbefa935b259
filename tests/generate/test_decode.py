"""Cached generation says what a naive loop over whole sequences says, each row by its own gates and dial, and stops where it should."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meetjax.adapters.tree import Bank, columns
from meetjax.generate import decode
from meetjax.generate.decode import generate_tokens
from meetjax.generate.sampling import RowSampling
from meetjax.models.decoder import apply, unstack, unstack_bank
from tests.conftest import MOVING, TINY, apart, random_bank, random_params

CONFIG = dataclasses.replace(TINY, layers=2, eos_token_ids=())
STOPPING = dataclasses.replace(CONFIG, eos_token_ids=(2, 5))
PARAMS = random_params(CONFIG)
FLAT = unstack(PARAMS)
PROMPTS = [[1, 20, 31, 42, 9, 8], [33, 44], [1, 60, 70], [1, 11, 12, 13, 14], [90, 91, 92, 93]]
NEW = 9
DIAL = np.array([1.0, 0.4, 0.0, 1.5, 1.0], np.float32)

generate = generate_tokens
naive_logits = jax.jit(apply, static_argnums=0)


def padded(prompts, filler=0):
    width = max(len(prompt) for prompt in prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return np.array([prompt + [filler] * (width - len(prompt)) for prompt in prompts], np.int32), lengths


def greedy(count):
    return RowSampling(jnp.zeros(count), jnp.zeros(count, jnp.int32), jnp.ones(count), jnp.arange(count, dtype=jnp.int32))


def naive(bank, gates, dial):
    """Greedy continuations by whole right-padded forward passes: no cache."""
    texts = [list(prompt) for prompt in PROMPTS]
    width = max(len(prompt) for prompt in PROMPTS) + NEW
    margin = np.inf
    for _ in range(NEW):
        tokens = np.array([text + [0] * (width - len(text)) for text in texts], np.int32)
        logits = np.asarray(naive_logits(CONFIG, PARAMS, tokens, bank, gates, dial=dial))
        for row, text in enumerate(texts):
            scores = np.sort(logits[row, len(text) - 1])
            margin = min(margin, scores[-1] - scores[-2])
            text.append(int(np.argmax(logits[row, len(text) - 1])))
    assert margin > 1e-4  # no tie that rounding could decide
    return np.array([text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)])


def everything():
    """(bank of all kinds with two adapters each, gates that put each row under another mixture, one row under none)."""
    bank = apart(random_bank(CONFIG))
    gates = np.random.default_rng(3).uniform(0, 1.2, (len(PROMPTS), columns(bank))).astype(np.float32)
    gates[0] = 0
    gates[1, 2:] = 0  # soft prompts alone
    return bank, gates


@pytest.mark.parametrize("kind", [None, *MOVING, "all"])
def test_greedy_equals_naive_loop(kind):
    """Rows of unequal length: every kind alone at gates of its own, and all of them with a dial a row."""
    if kind is None:
        bank, gates, dial = None, None, None
    elif kind == "all":
        bank, gates, dial = *everything(), DIAL
    else:
        bank = random_bank(CONFIG, (kind,), entries=(0,))
        gates, dial = np.linspace(0, 1.3, len(PROMPTS), dtype=np.float32)[:, None], None
    expected = naive(bank, gates, dial)
    tokens, lengths = padded(PROMPTS)
    found, count = generate(CONFIG, FLAT, tokens, lengths, greedy(len(PROMPTS)), bank, gates, dial, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(count, NEW)
    if kind is not None:
        plain, _ = generate(CONFIG, FLAT, tokens, lengths, greedy(len(PROMPTS)), max_new_tokens=NEW)
        np.testing.assert_array_equal(found[0], plain[0])  # the row whose gates are 0
        assert (np.asarray(found)[1:] != np.asarray(plain)[1:]).any()


@pytest.fixture(scope="module")
def run():
    """Generates for rows of `everything`: (tokens, counts)."""
    bank, gates = everything()
    calls = partial(generate_tokens, STOPPING, max_new_tokens=NEW)
    tokens, lengths = padded(PROMPTS)

    def of(order=(0, 1, 2, 3, 4), *, temperature=0.0, seeds=100, limit=NEW, strength=1.0, dial=DIAL, filler=0):
        order = np.array(order)
        rows = RowSampling(
            jnp.full(len(order), temperature, jnp.float32), jnp.zeros(len(order), jnp.int32), jnp.ones(len(order)),
            jnp.asarray(order + seeds, jnp.int32),
        )  # fmt: skip
        filled = np.where(np.arange(tokens.shape[1]) >= lengths[:, None], filler, tokens).astype(np.int32)
        limits = jnp.asarray(np.broadcast_to(limit, len(order)), jnp.int32)
        return tuple(map(np.asarray, calls(FLAT, filled[order], lengths[order], rows, bank, strength * gates[order], dial[order], limits)))

    return of


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_rows_do_not_depend_on_their_company(run, temperature):
    """Every row in another place beside copies of other rows (a batch of one text would be another program with other rounding)."""
    together, counts = run(temperature=temperature)
    for order in ([4, 3, 2, 1, 0], [2, 2, 0, 2, 1]):
        tokens, count = run(order, temperature=temperature)
        np.testing.assert_array_equal(tokens, together[order])
        np.testing.assert_array_equal(count, counts[order])


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_rows_alone_equal_rows_in_company(temperature):
    """Alone without padding, in a program of another batch size."""
    bank, gates = everything()

    def rows(seeds):
        return RowSampling(
            jnp.full(len(seeds), temperature, jnp.float32),
            jnp.zeros(len(seeds), jnp.int32),
            jnp.ones(len(seeds)),
            jnp.asarray(seeds, jnp.int32),
        )

    tokens, lengths = padded(PROMPTS)
    together, _ = generate(CONFIG, FLAT, tokens, lengths, rows(range(40, 45)), bank, gates, DIAL, max_new_tokens=NEW)
    row = slice(3, 4)
    own, none = padded(PROMPTS[row])
    alone, _ = generate(CONFIG, FLAT, own, none, rows([43]), bank, gates[row], DIAL[row], max_new_tokens=NEW)
    np.testing.assert_array_equal(alone, together[row])


def test_sampling_is_seeded(run):
    first, again, other = run(temperature=1.0), run(temperature=1.0), run(temperature=1.0, seeds=900)
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != other[0]).any()


def test_padding_tokens_never_matter(run):
    np.testing.assert_array_equal(run()[0], run(filler=2)[0])


def test_eos_stops_a_row_and_counts_itself(run):
    """A row's tokens are the free run's up to its first end token, which counts; what follows is 0 and does not."""
    bank, gates = everything()
    tokens, lengths = padded(PROMPTS)
    stopped = 0
    for seed in range(0, 30, 5):
        rows = RowSampling(jnp.full(5, 3.0), jnp.zeros(5, jnp.int32), jnp.ones(5), jnp.arange(seed, seed + 5, dtype=jnp.int32))
        free, _ = generate(CONFIG, FLAT, tokens, lengths, rows, bank, gates, DIAL, max_new_tokens=NEW)
        found, count = run(temperature=3.0, seeds=seed)
        for row in range(5):
            ends = np.flatnonzero(np.isin(free[row], STOPPING.eos_token_ids))
            length = ends[0] + 1 if len(ends) else NEW
            assert count[row] == length
            np.testing.assert_array_equal(found[row, :length], free[row, :length])
            np.testing.assert_array_equal(found[row, length:], 0)
            stopped += length < NEW
    assert stopped > 3


def test_limits_are_per_row(run):
    free, counts = run(temperature=1.0)
    limit = np.array([1, 4, NEW, 2, 7])
    found, count = run(temperature=1.0, limit=limit)
    np.testing.assert_array_equal(count, np.minimum(limit, counts))
    for row in range(5):
        np.testing.assert_array_equal(found[row, : count[row]], free[row, : count[row]])
        np.testing.assert_array_equal(found[row, count[row] :], 0)


def test_strengths_change_without_recompilation(run):
    """Gates, dials, temperatures, seeds and limits are data: one program for all of them."""
    run()
    programs = decode.first_token._cache_size(), decode.next_token._cache_size()
    texts = {strength: run(strength=strength)[0] for strength in (0.0, 0.5, 1.0, 2.0)}
    texts |= {"dial": run(dial=0 * DIAL)[0], "sampled": run(temperature=0.7)[0], "short": run(limit=3)[0]}
    assert (decode.first_token._cache_size(), decode.next_token._cache_size()) == programs
    np.testing.assert_array_equal(texts[0.0], texts["dial"])  # both are the base
    assert (texts[0.0] != texts[1.0]).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_prompts_run_apart_say_the_same(run, monkeypatch, temperature):
    """Every kind and a dial, each length a group of its own, against all padded to the longest."""
    together, counts = run(temperature=temperature)
    monkeypatch.setattr(decode, "BUCKET", 1)
    monkeypatch.setattr(decode, "WORTH", 1)
    monkeypatch.setattr(decode, "SHARE", 0.0)
    _, lengths = padded(PROMPTS)
    assert len(decode.cut_by_length(lengths)) == len(PROMPTS)
    found, count = run(temperature=temperature)
    np.testing.assert_array_equal(found, together)
    np.testing.assert_array_equal(count, counts)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_groups_of_prompts_are_worth_their_programs(lengths):
    """Every row is in one group, no group is longer than the one before, and each cut leaves out what it has to."""
    groups = [np.asarray(lengths)[rows] for rows in decode.cut_by_length(np.asarray(lengths))]
    assert sorted(np.concatenate(groups)) == sorted(lengths)
    assert all(a.min() >= b.max() for a, b in pairwise(groups))
    padded = sum(len(group) * decode.rounded(int(group.max())) for group in groups)
    whole = len(lengths) * decode.rounded(max(lengths))
    assert whole - padded >= decode.WORTH * (len(groups) - 1)


def test_a_long_prompt_among_short_ones_is_run_alone():
    groups = decode.cut_by_length(np.array([181, 69, 47, 78, 38, 66, 41, 467]))
    assert [rows.tolist() for rows in groups] == [[7], [0], [3, 1, 5, 2, 6, 4]]
    assert len(decode.cut_by_length(np.array([69, 47, 78, 96]))) == 1


def test_layers_apart_say_the_same(run):
    """A bank of every kind with a leaf for each layer."""
    bank, gates = everything()
    tokens, lengths = padded(PROMPTS)
    rows, apart_bank = greedy(len(PROMPTS)), unstack_bank(bank)
    assert len(apart_bank.lora.q.a) == len(apart_bank.edit.down.s) == CONFIG.layers
    found, _ = generate(STOPPING, FLAT, tokens, lengths, rows, apart_bank, gates, DIAL, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, run()[0])


def test_empty_bank_is_the_base():
    tokens, lengths = padded(PROMPTS)
    runs = [generate(CONFIG, FLAT, tokens, lengths, greedy(5), bank, max_new_tokens=NEW)[0] for bank in (None, Bank())]
    np.testing.assert_array_equal(*runs)
