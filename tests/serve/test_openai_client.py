"""The client that people have already: OpenAI's own, against the server on the loopback."""

from __future__ import annotations

import math

import pytest

openai = pytest.importorskip("openai", reason="the openai client is not installed")

from meetjax.data.records import Message
from meetjax.generate.requests import encode_prompt
from meetjax.generate.sampling import Sampling
from meetjax.serve.stream import Ask

ASKED = [{"role": "user", "content": "a short answer?"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def offline(served, model):
    """The engine's own answer to ASKED."""
    ids = tuple(encode_prompt(model.tokenizer, (Message("user", ASKED[0]["content"]),), "chat"))

    def answer(limit=None, **options):
        return served.engine.text(Ask(ids, max_new_tokens=limit or served.engine.capacity - len(ids), **options))

    return answer


def chat(client, **options):
    return client.chat.completions.create(**{"model": "base", "messages": ASKED, "temperature": 0} | options)


def test_chat(client, offline):
    reply = chat(client)
    assert reply.choices[0].message.content == offline()
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply._request_id and reply.id == f"chatcmpl-{reply._request_id}"


def test_a_conversation_can_go_on(client):
    """What the client gives back as a message of its own is taken."""
    said = chat(client).choices[0].message
    assert chat(client, messages=[*ASKED, said, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]).choices[0].message.content


def test_streaming_says_the_same(client, offline):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == offline()
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client).usage


def test_dials_in_the_extra_body(client, offline):
    dials = {"adapters": {"concise": 0.7, "harmless": -1}, "logit_dial": 1.2}
    expected = offline(adapters={"concise": 0.7, "harmless": -1.0}, dial=1.2)
    assert chat(client, extra_body=dials).choices[0].message.content == expected != offline()


def test_dials_in_the_models_name(client, offline, model):
    expected = offline(adapters={"concise": 0.5, "harmless": -1.0})
    for base in ("base", model.name):
        assert chat(client, model=f"{base}+concise@0.5+harmless@-1").choices[0].message.content == expected
    alone = offline(adapters={"concise": 1.0})
    for name in ("concise", "base+concise", "base+concise@1e0"):
        assert chat(client, model=name).choices[0].message.content == alone


def test_models_are_listed_under_names_that_work(client, model):
    listed = client.models.list().data
    assert [entry.id for entry in listed] == [model.name, "base+concise", "base+harmless", "base+polite"]
    for entry in listed:
        assert chat(client, model=entry.id).model == entry.id


def test_n_answers_are_drawn_apart(client, offline):
    reply = chat(client, n=3, seed=5, temperature=1.0)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == offline(seed=5, sampling=Sampling(1.0)) == chat(client, seed=5, temperature=1.0).choices[0].message.content
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=5, temperature=1.0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_and_limits(client, offline):
    whole = offline()
    end = whole[6:9]
    stopped = chat(client, stop=[end, "never"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(end)], "stop")
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        short = chat(client, **limit)
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_log_probabilities(client):
    entries = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    reply = chat(client, logprobs=True, top_logprobs=2, stream=True)
    streamed = [entry for chunk in reply if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == entries
    assert all(len(entry.top_logprobs) == 2 and math.isfinite(entry.logprob) for entry in entries)
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in entries)
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_completions(client, served, model):
    ids = tuple(encode_prompt(model.tokenizer, "the cat", "none"))
    expected = served.engine.text(Ask(ids, max_new_tokens=16))
    reply = client.completions.create(model="base", prompt="the cat", temperature=0, logprobs=1)
    assert reply.choices[0].text == expected
    assert len(reply.choices[0].logprobs.tokens) == len(reply.choices[0].logprobs.text_offset)
    several = client.completions.create(model="base", prompt=["the cat", "the mat"], temperature=0)
    assert several.choices[0].text == expected
    assert several.choices[1].index == 1
    assert client.completions.create(model="base", prompt=list(ids), temperature=0).choices[0].text == expected
    chunks = client.completions.create(model="base", prompt="the cat", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_errors_are_the_clients_own(client, served):
    for error, options in (
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.NotFoundError, {"model": "base+rude"}),
        (openai.BadRequestError, {"extra_body": {"adapters": {"rude": 1}}}),
        (openai.BadRequestError, {"extra_body": {"adapters": {"concise": 11}}}),
        (openai.BadRequestError, {"model": "base+concise@0.5", "extra_body": {"adapters": {"concise": 1}}}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "a cat " * 500}]}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, {"response_format": {"type": "json_object"}}),
    ):
        with pytest.raises(error) as told:
            chat(client, **options)
        assert told.value.body["message"]
    assert "concise, harmless, polite" in str(told_of(client, {"rude": 1}))
    assert chat(client, user="me", metadata={"a": "b"}, tools=[], response_format={"type": "text"}).choices[0].message.content


def told_of(client, adapters):
    with pytest.raises(openai.BadRequestError) as told:
        chat(client, extra_body={"adapters": adapters})
    return told.value


def test_an_engine_that_breaks_is_told_in_the_stream(client, served):
    served.engine.going.clear()
    stream = chat(client, stream=True)
    next(iter(stream))
    served.engine.broken = True
    served.engine.going.set()
    with pytest.raises(openai.APIError, match="the device is lost"):
        list(stream)
    served.engine.broken = False
    assert chat(client).choices[0].message.content
