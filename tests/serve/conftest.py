"""A tiny model with a bank of eight adapters, and an engine that has them all."""

from __future__ import annotations

import dataclasses

import pytest

from meetjax.adapters.tree import Bank
from meetjax.models import sites
from meetjax.models.load import Model
from meetjax.serve.engine import Engine, Room
from tests.conftest import CHAT, MOVING, TINY, apart, build_tokenizer, random_bank, random_params, take
from tests.serve.fake import FakeEngine

CONFIG = dataclasses.replace(TINY, layers=2, vocab=300, max_position=256, sliding_window=50, window_layers=(1,))
ROOM = Room(3, 4, 2, 3, 2, sites.LINEAR, 3, sites.EDITABLE, 2, 1)
SLOTS, CAPACITY = 4, 192
NAMES = tuple(f"{kind}{n}" for kind in MOVING for n in range(2))
"""The adapters, in the order of the columns of BANK."""
BANK = apart(random_bank(CONFIG))


def adapter(kind, n):
    """The bank of one of NAMES."""
    return Bank(**{kind: getattr(take(random_bank(CONFIG), n), kind)})


@pytest.fixture(scope="package")
def tiny_model():
    return Model("tiny", CONFIG, random_params(CONFIG), build_tokenizer(adds_bos=False, chat=CHAT), "fingerprint")


@pytest.fixture(scope="package")
def make_engine(tiny_model):
    """Engines whose programs are compiled once, by the first."""
    made = []

    def make(**options):
        engine = Engine(tiny_model, **({"slots": SLOTS, "capacity": CAPACITY, "room": ROOM} | options))
        made.append(engine)
        for kind in MOVING:
            for n in range(2):
                engine.put(f"{kind}{n}", adapter(kind, n))
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="package")
def engine(make_engine):
    """One with every adapter, warm."""
    engine = make_engine()
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def served(model):
    """A server on the loopback over an engine without a model."""
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from tests.serve.loopback import serving

    with serving(FakeEngine(model), model, body=1 << 16, patience=2.0) as it:
        yield it
        assert it.engine.idle()
