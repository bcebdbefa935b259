"""A list of requests: answers in its order, whatever the batches; every mistake has its message."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import meetjax.generate.requests as requests_module
from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.data.records import Message
from meetjax.data.template import render_prompt
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import Request, generate_texts, stream_text
from meetjax.generate.sampling import Sampling
from meetjax.models.decoder import unstack
from tests.conftest import build_tokenizer, random_bank

NEW = 8
REQUESTS = [
    Request("the cat?", gates=(1.0,)),
    Request("a much longer question about the mat and the cat and the user and the system", gates=(0.0,)),
    Request("hello", gates=(0.5,), sampling=Sampling(1.0), seed=3),
    Request("hello"),
    Request((Message("user", "hello"), Message("assistant", "how"), Message("user", "the mat")), gates=(2.0,)),
    Request("hello", system="a short answer", gates=(1.0,), sampling=Sampling(0.8, top_k=20), seed=4),
]
DIALLED = [dataclasses.replace(request, dial=dial) for request, dial in zip(REQUESTS, (1.0, 0.5, None, 2.0, 0.0, -1.0), strict=True)]


@pytest.fixture(scope="module")
def bank(model):
    return random_bank(model.config, ("edit",), entries=(0,), editable=("down",))


@pytest.fixture(scope="module")
def answers(model, bank):
    return generate_texts(model, DIALLED, adapters=bank, max_new_tokens=NEW)


def test_answers_come_in_order_whatever_the_batches(model, bank, answers):
    """All in one batch; in batches of four, sorted by length and the last one filled up; and the list turned round."""
    fours = generate_texts(model, DIALLED, adapters=bank, max_new_tokens=NEW, batch_size=4)
    turned = generate_texts(model, DIALLED[::-1], adapters=bank, max_new_tokens=NEW, batch_size=4)
    assert fours == answers
    assert turned[::-1] == answers
    assert len({answer.ids for answer in answers}) > 4


def test_text_and_count_belong_to_the_ids(model, answers):
    for answer in answers:
        assert answer.tokens == len(answer.ids) <= NEW
        assert answer.ended == (answer.ids[-1] == model.tokenizer.eos_token_id)
        assert answer.ended or answer.tokens == NEW
        assert answer.text == model.tokenizer.decode(answer.ids[: -1 if answer.ended else None])


def test_an_answer_ends_at_eos(model):
    """An end token that greedy decoding reaches: it counts, and the text is without it."""
    (free,) = generate_texts(model, [Request("hello")], max_new_tokens=NEW)
    stop = next(token for token in free.ids[1:] if token != free.ids[0])
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=(2, stop)))
    (answer,) = generate_texts(short, [Request("hello")], max_new_tokens=NEW)
    end = free.ids.index(stop)
    assert answer.ids == free.ids[: end + 1]
    assert answer.ended and answer.tokens == end + 1
    assert answer.text == model.tokenizer.decode(free.ids[:end])


def test_plain_text_is_a_user_message(model):
    """With a chat template, text, messages and the rendered text under template none are one prompt."""
    text = render_prompt(model.tokenizer, "hello")
    runs = [generate_texts(model, [Request(p)], max_new_tokens=NEW) for p in ("hello", (Message("user", "hello"),))]
    runs.append(generate_texts(model, [Request(text)], max_new_tokens=NEW, template="none"))
    assert runs[0] == runs[1] == runs[2]


def test_bos_is_added_once(model):
    """Where the tokenizer adds BOS to every text, the prompt has it, and has it once when the template writes it too."""
    for chat in (None, model.tokenizer.chat_template, "<s>" + model.tokenizer.chat_template):
        tokenizer = build_tokenizer(adds_bos=True, chat=chat)
        ids = requests_module.encode(dataclasses.replace(model, tokenizer=tokenizer), Request("hello"), "auto", NEW)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert model.tokenizer.bos_token_id not in requests_module.encode(model, Request("hello"), "auto", NEW)


def test_progress_counts_every_request_once(model, bank):
    seen = []
    generate_texts(model, DIALLED, adapters=bank, max_new_tokens=NEW, batch_size=4, progress=seen.append)
    assert seen == [4, 2]


def test_long_prompts_are_run_fewer_at_once(model, bank, answers, monkeypatch):
    seen, longest = [], max(len(answer.prompt) for answer in answers)
    monkeypatch.setattr(requests_module, "TOKENS", 3 * (longest + NEW))
    fewer = generate_texts(model, DIALLED, adapters=bank, max_new_tokens=NEW, batch_size=4, progress=seen.append)
    assert seen[0] == 2 and sum(seen) == len(DIALLED) and [answer.ids for answer in fewer] == [answer.ids for answer in answers]


def test_nothing_to_do(model):
    assert generate_texts(model, []) == []


def error_of(model, requests, **options):
    with pytest.raises(MeetjaxError) as caught:
        generate_texts(model, requests, **({"max_new_tokens": NEW} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_requests_raise(model, bank):
    hello = [Request("hello", gates=(1.0,))]
    assert "max_new_tokens; expected >= 1; found 0" in error_of(model, hello, max_new_tokens=0)
    assert "batch_size; expected >= 1; found 0" in error_of(model, hello, batch_size=0)
    assert "gates without adapters" in error_of(model, hello)
    wrong = [Request("hello", gates=(1.0, 0.5))]
    assert "gates: shape; expected (1, 1): rows, bank columns; found (1, 2)" in error_of(model, wrong, adapters=bank)
    assert "gates: shape; expected (1, 1)" in error_of(model, hello + wrong, adapters=bank)
    assert "gates: value; expected finite numbers" in error_of(model, [Request("hello", gates=(np.nan,))], adapters=bank)
    assert "dial: value; expected finite numbers" in error_of(model, [Request("hello", dial=np.inf)], adapters=bank)
    assert "sampling: seed; expected 0 to 2^31 - 1; found -1" in error_of(model, [Request("hello", seed=-1)])
    assert "sampling: seed" in error_of(model, [Request("hello", seed=2**31)])
    assert "prompt: too long; expected prompt + max_new_tokens <= 256 tokens; found 312 + 8" in error_of(model, [Request("zq" * 150)])
    assert "prompt: no token; expected some text" in error_of(model, [Request("")], template="none")
    assert "template; expected auto or chat or none; found 'chats'" in error_of(model, hello, template="chats", adapters=bank)


def test_negative_gate_of_a_prompt_raises(model):
    bank = init_bank(model.config, model.params, (PromptSpec(2, "cat"), EditSpec()), model.tokenizer, jax.random.key(0))
    message = error_of(model, [Request("hello", gates=(-0.5,))], adapters=bank)
    assert "gates: value of a soft prompt; expected >= 0" in message
    assert "use the logit dial for negative strengths" in message


def test_messages_without_a_chat_template_raise(model):
    plain = dataclasses.replace(model, tokenizer=build_tokenizer(adds_bos=False, chat=None))
    for request in (Request((Message("user", "hello"),)), Request("hello", system="be brief")):
        assert "expected a chat template; found a tokenizer without one" in error_of(plain, [request])
    assert "template 'chat'; expected a tokenizer with a chat template" in error_of(plain, [Request("hello")], template="chat")


def test_streamed_pieces_are_the_answer(model, bank, answers):
    """Piece by piece as it becomes certain: together the same text, and no piece ends inside a character."""
    chosen, params = (0, 1, 5), unstack(model.params)
    pieces = [list(stream_text(model, params, DIALLED[i], adapters=bank, max_new_tokens=NEW)) for i in chosen]
    assert ["".join(own) for own in pieces] == [answers[i].text for i in chosen]
    assert max(len(own) for own in pieces) > 2
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for own in pieces for piece in own[:-1])


def test_a_stream_raises_before_its_first_piece(model):
    with pytest.raises(MeetjaxError, match="prompt: too long"):
        next(stream_text(model, unstack(model.params), Request("hello"), max_new_tokens=256))
