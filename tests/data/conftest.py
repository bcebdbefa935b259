"""A tiny byte-level tokenizer, built in memory: with a chat template, without one, and one that adds BOS by itself."""

from __future__ import annotations

import copy

import pytest
from tokenizers import processors

from tests.conftest import CHAT, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(adds_bos=False, chat=CHAT)


@pytest.fixture(scope="session")
def plain_tokenizer():
    return build_tokenizer(adds_bos=False, chat=None)


@pytest.fixture(scope="session")
def bos_tokenizer():
    return build_tokenizer(adds_bos=True, chat=None)


@pytest.fixture(scope="session")
def trimming_tokenizer(plain_tokenizer):
    """Gives the same ids, but takes blanks out of the offsets, as RoBERTa's tokenizer does."""
    trimming = copy.deepcopy(plain_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return trimming


@pytest.fixture(scope="session")
def bos_chat_tokenizer():
    """Its template writes BOS although the tokenizer adds one as well: the case that gives two when handled carelessly."""
    return build_tokenizer(adds_bos=True, chat="<s>" + CHAT)


@pytest.fixture
def eosless_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = None
    return changed
