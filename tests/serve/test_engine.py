"""The engine: an answer is the same alone and in any company, adapters come and go without a compilation, nothing is left waiting."""

from __future__ import annotations

import asyncio
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.io import save_adapters
from meetjax.errors import MeetjaxError
from meetjax.generate.decode import generate_tokens
from meetjax.generate.sampling import RowSampling, Sampling
from meetjax.models.decoder import unstack
from meetjax.serve.engine import Ask, Engine, QueueFull, Room
from tests.conftest import assert_close, quick_forward, random_bank, take
from tests.serve.conftest import BANK, CAPACITY, CONFIG, NAMES, adapter

NEW = 10
HELLO = (1, 20, 31, 42)


def random_asks(count, seed=0):
    """Requests of every sort: short and long prompts with common beginnings, up to three adapters, dials, sampled and greedy."""
    draw = np.random.default_rng(seed)
    text = draw.integers(3, 300, CAPACITY)
    asks = []
    for n in range(count):
        ids = tuple(int(token) for token in text[: [3, 9, 20, 66, 70, 140][n % 6] + n // 6])
        chosen = draw.choice(NAMES, n % 4, replace=False)
        adapters = {str(name): float(np.round(draw.uniform(0.2, 1.3), 2)) for name in chosen}
        dial = float(np.round(draw.uniform(-0.5, 1.6), 2)) if n % 5 == 2 else None
        sampling = Sampling(1.0, top_k=40) if n % 3 == 1 else Sampling()
        asks.append(Ask(ids, adapters, dial, sampling, seed=n, max_new_tokens=1 + int(draw.integers(NEW)), logprobs=2))
    return asks


def short(*args, **options):
    """A request for at most 8 tokens."""
    return Ask(*args, **({"max_new_tokens": 8} | options))


def answer(stream):
    """The pieces of a whole stream."""
    pieces = list(stream)
    assert stream.error is None, stream.error
    return pieces


def assert_same(found, expected):
    """The same tokens, texts and ends, and log-probabilities to rounding (another place in the batch may add in another order)."""

    def exact(pieces):
        return [(piece.text, piece.token, tuple(token for token, _ in piece.top), piece.finish) for piece in pieces]

    def logprobs(pieces):
        return [[piece.logprob, *(value for _, value in piece.top)] for piece in pieces]

    for pieces, others in zip(found, expected, strict=True):
        assert exact(pieces) == exact(others)
        if others[0].logprob is not None:
            assert_close(logprobs(pieces), logprobs(others))


def offline(asks, params):
    """The tokens of each request by `generate_tokens`, all in one batch."""
    width = max(len(ask.ids) for ask in asks)
    tokens = np.stack([np.pad(np.asarray(ask.ids, np.int32), (0, width - len(ask.ids))) for ask in asks])
    lengths = np.asarray([len(ask.ids) for ask in asks], np.int32)
    gates = np.asarray([[ask.adapters.get(name, 0.0) for name in NAMES] for ask in asks], np.float32)
    dial = np.asarray([1.0 if ask.dial is None else ask.dial for ask in asks], np.float32)
    settings = [ask.sampling for ask in asks]
    rows = RowSampling(
        jnp.asarray([s.temperature for s in settings]), jnp.asarray([s.top_k for s in settings]), jnp.asarray([s.top_p for s in settings]),
        jnp.asarray([ask.seed for ask in asks]),
    )  # fmt: skip
    limit = np.asarray([ask.max_new_tokens for ask in asks], np.int32)
    found, counts = generate_tokens(CONFIG, unstack(params), tokens, lengths, rows, BANK, gates, dial, limit, max_new_tokens=NEW)
    return [tuple(row[:count].tolist()) for row, count in zip(np.asarray(found), counts, strict=True)]


@pytest.fixture(scope="module")
def asks():
    return random_asks(18)


@pytest.fixture(scope="module")
def alone(engine, asks):
    """The answer to each of `asks`, one after the other."""
    return [answer(engine.submit(ask)) for ask in asks]


def test_answers_are_those_of_offline_generation(tiny_model, asks, alone):
    expected = offline(asks, tiny_model.params)
    assert [tuple(piece.token for piece in pieces) for pieces in alone] == expected
    for ask, pieces in zip(asks, alone, strict=True):
        ended = pieces[-1].token in CONFIG.eos_token_ids
        assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop" if ended else "length"]
        assert ended or len(pieces) == ask.max_new_tokens
    assert len(set(expected)) == len(expected)


def test_company_changes_nothing(engine, asks, alone):
    """Joining at random times in random orders, from several threads."""
    for seed in range(3):
        draw = np.random.default_rng(seed)
        order, pauses, found = draw.permutation(len(asks)), draw.uniform(0, 0.01, len(asks)), {}

        def client(mine, found=found, pauses=pauses):
            for n in mine:
                time.sleep(pauses[n])
                found[n] = engine.submit(asks[n])
            for n in mine:
                found[n] = answer(found[n])

        threads = [threading.Thread(target=client, args=(order[n::3],)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_same([found[n] for n in range(len(asks))], alone)


def test_a_known_prompt_changes_nothing(engine, asks, alone):
    """By now the blocks of all prompts are known; an engine that keeps none says the same."""
    before = engine.stats().prefix_hits
    assert_same([answer(engine.submit(ask)) for ask in asks[3:6]], alone[3:6])
    assert engine.stats().prefix_hits - before >= 4
    assert engine.stats().prefix_bytes > 0


def test_a_full_prefix_cache_forgets_the_oldest(make_engine, engine, asks, alone):
    small = make_engine(prefix_cache=60_000)
    found = [answer(small.submit(ask)) for ask in [*asks, *asks]]
    assert_same(found, [*alone, *alone])
    assert 0 < small.stats().prefix_bytes <= 60_000 < engine.stats().prefix_bytes
    small.close()


def test_logprobs_are_those_of_the_model(engine, tiny_model):
    ids, gates = (1, *range(30, 39)), np.zeros((1, len(NAMES)), np.float32)
    gates[0, NAMES.index("lora1")] = 0.6
    pieces = answer(engine.submit(short(ids, {"lora1": 0.6}, sampling=Sampling(2.0), seed=5, max_new_tokens=4, logprobs=3)))
    whole = np.asarray([[*ids, *(piece.token for piece in pieces)]], np.int32)
    logits = quick_forward(CONFIG, tiny_model.params, whole, BANK, gates)[0, len(ids) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert_close([piece.logprob for piece in pieces], [row[piece.token] for row, piece in zip(expected, pieces, strict=True)], like=logits)
    for row, piece in zip(expected, pieces, strict=True):
        assert [token for token, _ in piece.top] == np.argsort(-row)[:3].tolist()
        assert_close([logprob for _, logprob in piece.top], np.sort(row)[::-1][:3], like=logits)


def test_adapters_come_and_go(engine, asks, alone, tmp_path):
    """An adapter of a folder acts when loaded, is finished with when unloaded under a request, and leaves its place empty."""
    bank = take(random_bank(CONFIG, ("lora", "edit"), seed=9), 0)
    folder = save_adapters(tmp_path / "own", bank, base="tiny", fingerprint="fingerprint")
    base = answer(engine.submit(short(HELLO)))
    engine.load("own", folder)
    info = engine.adapters["own"]
    assert (info.kinds, info.folder) == (("lora", "edit"), folder)
    assert info.parameters == sum(leaf.size for leaf in jax.tree.leaves(bank))
    ask = short(HELLO, {"own": 1.0}, max_new_tokens=40)
    moved = answer(engine.submit(ask))
    assert [piece.token for piece in moved[:8]] != [piece.token for piece in base]
    going = engine.submit(ask)
    engine.unload("own")
    assert "own" not in engine.adapters
    with pytest.raises(MeetjaxError, match=r"'own' is not loaded; expected prompt0 or prompt1"):
        engine.submit(ask)
    assert_same([answer(going)], [moved])
    with pytest.raises(MeetjaxError, match=r"adapter own: not loaded"):
        engine.unload("own")
    engine.load("again", folder)
    assert_same([answer(engine.submit(short(HELLO, {"again": 1.0}, max_new_tokens=40)))], [moved])
    assert_same([answer(engine.submit(asks[3]))], alone[3:4])
    engine.unload("again")


def test_a_bank_of_several_columns_is_several_adapters(engine):
    bank = random_bank(CONFIG, ("edit",), entries=(0, 1), seed=11)
    with pytest.raises(MeetjaxError, match=r"adapter pair: no room; expected 2 of edits; found 1 of 3 are free; raise Room.edits"):
        engine.put("pair", bank)
    engine.unload("edit1")
    engine.put("pair", bank)
    assert {"pair.0", "pair.1"} <= set(engine.adapters)
    both = [answer(engine.submit(short(HELLO, {name: 1.0}))) for name in ("pair.0", "pair.1")]
    assert [piece.token for piece in both[0]] != [piece.token for piece in both[1]]
    for name in ("pair.0", "pair.1"):
        engine.unload(name)
    engine.put("edit1", adapter("edit", 1))


def test_what_does_not_fit_names_the_room(engine):
    for kind, options, message in (
        ("prompt", {"length": 5}, r"Room.prompt_length of 5; found 4; raise Room.prompt_length"),
        ("lora", {"rank": 3}, r"Room.rank of 3; found 2"),
    ):
        with pytest.raises(MeetjaxError, match=message):
            engine.put("large", random_bank(CONFIG, (kind,), entries=(0,), **options))
    with pytest.raises(MeetjaxError, match=r"nothing that moves the model"):
        engine.put("head", random_bank(CONFIG, ("reward",), entries=(0,)))
    with pytest.raises(MeetjaxError, match=r"adapter edit0 is loaded already"):
        engine.put("edit0", random_bank(CONFIG, ("edit",), entries=(0,)))
    with pytest.raises(MeetjaxError, match=r"adapter: name"):
        engine.put("a@b", random_bank(CONFIG, ("edit",), entries=(0,)))
    engine.put("third", adapter("prompt", 0))
    with pytest.raises(MeetjaxError, match=r"at most 2 at once; found 3"):
        engine.submit(short(HELLO, {"prompt0": 1.0, "prompt1": 0.5, "third": 0.1}))
    engine.unload("third")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (short(()), "prompt: no token"),
        (short((300,)), "prompt: token; expected 0 to 299; found 300"),
        (short(HELLO, max_new_tokens=0), "max_new_tokens; expected >= 1"),
        (short(HELLO, max_new_tokens=189), "prompt [+] max_new_tokens <= 192 tokens; found 4 [+] 189"),
        (short(HELLO, seed=-1), "seed; expected 0"),
        (short(HELLO, logprobs=9), "logprobs; expected 0 to 8"),
        (short(HELLO, stop=("",)), "stop; expected texts that are not empty"),
        (short(HELLO, {"edit0": float("nan")}), "strength of edit0; expected a number from -100 to 100; found nan"),
        (short(HELLO, {"edit0": 1e30}), "strength of edit0"),
        (short(HELLO, dial=float("inf")), "dial; expected a number"),
        (short(HELLO, {"prompt0": -0.5}), "strength of prompt0, a soft prompt; expected >= 0"),
        (short(HELLO, {"other": 0.5}), "'other' is not loaded"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine, ask, message):
    with pytest.raises(MeetjaxError, match=message):
        engine.submit(ask)


def test_a_request_fails_alone(engine, asks, alone):
    """Logits that are not finite end the request that asked for them; its neighbours and the next in its row do not notice."""
    bad = random_bank(CONFIG, ("edit",), entries=(0,))
    engine.put("bad", jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), bad))
    streams = [engine.submit(ask) for ask in (asks[5], short(HELLO, {"bad": 50.0}), asks[4], asks[3])]
    assert [list(stream)[-1].finish for stream in streams[1:2]] == ["error"]
    assert "not finite" in streams[1].error
    assert_same([answer(streams[n]) for n in (0, 2, 3)], [alone[n] for n in (5, 4, 3)])
    engine.unload("bad")
    assert_same([answer(engine.submit(ask)) for ask in asks[:6]], alone[:6])


def test_cancelling_frees_the_row(engine):
    stream = engine.submit(short(HELLO, {"edit0": 1.0}, dial=0.5, max_new_tokens=150, logprobs=1))
    assert next(stream).token is not None
    stream.cancel()
    rest = list(stream)
    assert rest[-1].finish == "cancelled"
    assert engine.stats().active == 0
    assert stream.new_tokens < 150


def test_streams_are_read_asynchronously(engine, asks, alone):
    async def read(ask):
        return [piece async for piece in engine.submit(ask)]

    async def all_of_them():
        return await asyncio.gather(*(read(ask) for ask in asks))

    assert_same(asyncio.run(all_of_them()), alone)


def test_nothing_was_compiled_since_the_start(engine):
    """Last of those that share the engine: requests, adapters and failures of every sort were data."""
    stats = engine.stats()
    assert stats.compiles == 0
    assert stats.done > 60
    assert (stats.active, stats.queued) == (0, 0)


def test_a_full_queue_refuses(make_engine, monkeypatch):
    engine = make_engine(queue=2)
    monkeypatch.setattr(engine, "_next_prefill", lambda: engine._changed.wait(0.01))
    waiting = [engine.submit(short(HELLO, max_new_tokens=2)) for _ in range(2)]
    with pytest.raises(QueueFull) as caught:
        engine.submit(short(HELLO))
    assert 1 <= caught.value.retry_after <= 60
    waiting[0].cancel()
    assert [piece.finish for piece in waiting[0]] == ["cancelled"]
    waiting.append(engine.submit(short(HELLO, max_new_tokens=2)))
    monkeypatch.undo()
    assert [answer(stream)[-1].finish for stream in waiting[1:]] == ["length", "length"]
    engine.close()


def test_a_crash_fails_every_stream(make_engine, monkeypatch, caplog):
    engine = make_engine()

    def broken():
        raise RuntimeError("no device")

    monkeypatch.setattr(engine._rows, "step", broken)
    streams = [engine.submit(short(HELLO)) for _ in range(6)]
    for stream in streams:
        assert list(stream)[-1].finish == "error"
        assert stream.error == "the engine stopped: RuntimeError: no device"
    with pytest.raises(MeetjaxError, match=r"the engine stopped: RuntimeError: no device"):
        engine.submit(short(HELLO))
    with pytest.raises(MeetjaxError, match=r"the engine stopped"):
        engine.unload("edit0")
    assert "the engine stopped" in caplog.text


def test_draining_finishes_what_is_open(make_engine):
    engine = make_engine()
    streams = [engine.submit(short(HELLO, max_new_tokens=20)) for _ in range(6)]
    engine.drain(60)
    assert all(stream.finished for stream in streams)
    with pytest.raises(MeetjaxError, match=r"the engine is shutting down"):
        engine.submit(short(HELLO))
    engine.close()
    assert [answer(stream)[-1].finish for stream in streams] == ["length"] * 6


def test_closing_fails_what_is_open(make_engine):
    engine = make_engine()
    streams = [engine.submit(short(HELLO, max_new_tokens=150)) for _ in range(6)]
    engine.close()
    assert [list(stream)[-1].finish for stream in streams][-1] == "error"
    assert streams[-1].error == "the engine was closed before this request ended"


def test_an_engine_without_room_is_the_base_model(tiny_model, engine):
    """No bank at all."""
    bare = Engine(tiny_model, slots=4, capacity=CAPACITY, room=Room(0, 0, 0, 0, 0, (), 0, ()))
    assert answer(bare.submit(short(HELLO))) == answer(engine.submit(short(HELLO)))
    with pytest.raises(MeetjaxError, match=r"Room.edits of 1 or more; found 0; raise Room.edits"):
        bare.put("edit", random_bank(CONFIG, ("edit",), entries=(0,)))
    bare.close()


def test_bad_engines_are_refused(tiny_model):
    for options, message in (
        ({"capacity": 257}, "capacity; expected 2 to 256 tokens; found 257"),
        ({"slots": 0}, "slots; expected >= 1"),
    ):
        with pytest.raises(MeetjaxError, match=message):
            Engine(tiny_model, **({"capacity": 64} | options))
    with pytest.raises(MeetjaxError, match=r"room: lora: unknown site nose"):
        Room(lora_sites=("q", "nose"))
