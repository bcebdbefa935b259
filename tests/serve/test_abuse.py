"""What a server meets in the open: each gets a clear 4xx, and the next request works."""

from __future__ import annotations

import base64
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from meetjax.serve.stream import Piece
from tests.serve.fake import FakeEngine
from tests.serve.loopback import serving, until

GOOD = {"model": "base", "messages": [{"role": "user", "content": "a cat?"}], "temperature": 0}
PATH = "/v1/chat/completions"


@pytest.fixture
def post(served):
    """Posts a body, and afterwards makes sure that a good one is answered."""
    with httpx.Client(base_url=served.url, timeout=20) as client:

        def send(body, path=PATH, **options):
            content = body if isinstance(body, bytes) else json.dumps(body)  # with NaN, as a careless client writes it
            return client.post(path, content=content, headers={"content-type": "application/json"} | options)

        yield send
        assert send(GOOD).status_code == 200


def told(reply, status, *parts, **facts):
    """The message of an error body of this status, which says all of `parts`."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for part in parts:
        assert part in error["message"]
    assert error | facts == error
    return error["message"]


FIELDS = {
    "NaN strength": ({"adapters": {"concise": float("nan")}}, "adapters.concise", {"param": "adapters"}),
    "infinite strength": ({"adapters": {"concise": float("-inf")}}, "adapters.concise", {}),
    "absurd strength": ({"adapters": {"concise": 10.5}}, "less than or equal to 10", {}),
    "strength that is text": ({"adapters": {"concise": "0.7"}}, "valid number", {}),
    "NaN dial": ({"logit_dial": float("nan")}, "logit_dial", {}),
    "absurd dial": ({"logit_dial": 1e300}, "logit_dial", {}),
    "absurd strength in the name": ({"model": "base+concise@1e999"}, "expected -10 to 10", {}),
    "unknown adapter": ({"adapters": {"rude": 1}}, "concise, harmless, polite", {"code": "adapter_not_found"}),
    "soft prompt below 0": ({"adapters": {"polite": -0.5}}, "soft prompt", {}),
    "NaN temperature": ({"temperature": float("nan")}, "temperature", {}),
    "negative temperature": ({"temperature": -1}, "temperature", {}),
    "top_p of 0": ({"top_p": 0}, "top_p", {}),
    "no messages": ({"messages": []}, "messages", {}),
    "role that is none": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", {}),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0", {}),
    "roles that the template refuses": ({"messages": GOOD["messages"] * 2}, "roles must alternate", {}),
    "half a surrogate pair": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", {}),
    "half a surrogate pair in a name": ({"adapters": {"\ud800": 1}}, "adapters", {}),
    "half a surrogate pair as a field": ({"\ud800": 1}, "", {}),
    "tools": ({"tools": [{"type": "function"}]}, "tools", {"code": "unsupported_parameter", "param": "tools"}),
    "unknown field": ({"adapter": {"concise": 1}}, "unrecognized field 'adapter'", {"code": "unknown_parameter"}),
    "too many answers": ({"n": 17}, "n: ", {"param": "n"}),
    "seed out of range": ({"seed": 2**31}, "seed", {}),
    "huge number": ({"max_tokens": 10**400}, "", {}),
    "empty stop": ({"stop": ""}, "stop", {}),
    "more new tokens than fit": ({"max_tokens": 250}, "prompt + max_tokens <= 256", {"code": "context_length_exceeded"}),
    "top_logprobs alone": ({"top_logprobs": 2}, "logprobs", {}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_field_is_told(name, post):
    fields, part, facts = FIELDS[name]
    told(post(GOOD | fields), 400, part, **facts)


BODIES = {
    "broken JSON": (b'{"model": "base", "mess', "broken JSON"),
    "no JSON": (b"\xff\xfe\x00", ""),
    "nothing": (b"", ""),
    "a list": (b"[]", ""),
    "deep nesting": (b"[" * 60000, ""),
    "endless digits": (b'{"seed": ' + b"1" * 6000 + b"}", ""),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_told(name, post):
    content, part = BODIES[name]
    told(post(content), 400, part)


def test_long_prompts_are_told(post):
    told(post(GOOD | {"messages": [{"role": "user", "content": "a cat " * 2000}]}), 400, "<= 256 tokens", param="messages")
    told(post({"model": "base", "prompt": [[1] * 300]}, "/v1/completions"), 400, "<= 256 tokens", param="prompt")
    told(post({"model": "base", "prompt": [99999]}, "/v1/completions"), 400, "below 320")
    told(post({"model": "base", "prompt": ""}, "/v1/completions"), 400, "no token")


def test_unknown_models_and_routes_are_told(post, served):
    told(post(GOOD | {"model": "gpt-4o"}), 404, "expected base", code="model_not_found")
    for name in ("base+", "base+concise@", "base+concise@nan", "base+concise@1@2", "+concise", ""):
        told(post(GOOD | {"model": name}), 404, code="model_not_found")
    told(post(GOOD, "/v1/embeddings"), 404)
    told(httpx.get(served.url + PATH), 405)


def test_large_bodies_are_not_read(post, served):
    large = GOOD | {"messages": [{"role": "user", "content": "x" * (1 << 17)}]}
    told(post(large), 413, "65536 bytes")

    def chunks():
        yield from (b"x" * 4096 for _ in range(64))

    with httpx.Client() as client:
        told(client.post(served.url + PATH, content=chunks()), 413, "65536 bytes")


def open_raw(served, body, length=None):
    """A connection that has sent a request and reads nothing."""
    content = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length or len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(head.encode() + content)
    return connection


def test_a_body_that_does_not_come_is_given_up(post, served):
    with open_raw(served, GOOD, length=5000) as connection:
        assert post(GOOD).status_code == 200  # meanwhile
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot(stream, post, served):
    engine = served.engine
    engine.pace = 0.05
    before = engine.cancelled
    with open_raw(served, GOOD | {"stream": stream, "n": 2, "seed": 3}):
        until(lambda: len(engine._active) == 2)
    until(engine.idle)
    engine.pace = 0.0
    assert engine.cancelled - before == 2


def test_a_client_that_reads_nothing_holds_nobody_up_and_is_let_go(model):
    """Its reply is far larger than what sockets hold; others are answered meanwhile."""
    engine = FakeEngine(model, capacity=1 << 16)
    own = engine.pieces
    engine.pieces = lambda ask: [Piece("x" * (1 << 16), 5)] * 512 if ask.max_new_tokens == 60000 else own(ask)
    with serving(engine, model, patience=1.0) as served, open_raw(served, GOOD | {"stream": True, "max_tokens": 60000}):
        until(lambda: engine.tokens > 10)
        assert httpx.post(served.url + PATH, json=GOOD | {"max_tokens": 9}).status_code == 200
        engine.pace = 0.05
        until(lambda: engine.cancelled == 1)
        until(lambda: 'status="499"' in httpx.get(served.url + "/metrics").text)


def test_more_than_the_queue_holds_is_told_when_to_come_again(post, served):
    engine = served.engine
    engine.going.clear()
    with ThreadPoolExecutor(20) as pool:
        replies = [pool.submit(httpx.post, served.url + PATH, json=GOOD, timeout=30) for _ in range(20)]
        until(lambda: sum(reply.done() for reply in replies) == 8)  # 4 slots and a queue of 8 hold the other twelve
        refused = [reply.result() for reply in replies if reply.done()]
        engine.going.set()
        answered = [reply.result() for reply in replies if reply.result().status_code == 200]
    for reply in refused:
        told(reply, 429, "waiting", code="queue_full", type="rate_limit_error")
        assert int(reply.headers["retry-after"]) >= 1
    assert len(answered) == 12


def test_of_several_answers_all_or_none_are_queued(post, served):
    engine = served.engine
    engine.going.clear()
    reply = post(GOOD | {"n": 16})
    engine.going.set()
    told(reply, 429)
    until(engine.idle)


def test_the_key_is_needed_for_all_but_health(model):
    with serving(FakeEngine(model), model, key="s3cret") as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/health").status_code == 200
        basic = base64.b64encode(b"me:s3cret").decode()
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            for wrong in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic !"}, {"authorization": "s3cret"}):
                told(client.get(path, headers=wrong), 401, "key", code="invalid_api_key")
            for right in ("Bearer s3cret", f"Basic {basic}"):
                assert client.get(path, headers={"authorization": right}).status_code == 200


def test_metrics_and_ids(post, served):
    assert post(GOOD, **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert post(GOOD, **{"x-request-id": "a b\x7f"}).headers["x-request-id"] != "a b\x7f"
    text = httpx.get(served.url + "/metrics").text
    assert f'meetjax_requests_total{{route="{PATH}",status="200"}}' in text
    assert "meetjax_engine_slots 4.0" in text
    assert "meetjax_first_token_seconds_count" in text


def test_a_stop_finishes_or_fails_every_open_request(model):
    """Slow answers within the grace end well; one that does not is told so, in its stream; nothing new is taken."""
    engine = FakeEngine(model, pace=0.02)
    with serving(engine, model, grace=5.0) as served, ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(httpx.post, served.url + PATH, json=GOOD, timeout=20) for _ in range(4)]
        until(lambda: len(engine._active) == 4)
        served.server.should_exit = True
        assert [reply.result().status_code for reply in replies] == [200] * 4
    engine = FakeEngine(model)
    with serving(engine, model, grace=0.5) as served, ThreadPoolExecutor(2) as pool:
        engine.going.clear()
        whole = pool.submit(httpx.post, served.url + PATH, json=GOOD, timeout=20)
        streamed = pool.submit(httpx.post, served.url + PATH, json=GOOD | {"stream": True}, timeout=20)
        until(lambda: len(engine._waiting) + len(engine._active) == 2)
        served.server.should_exit = True
        told(whole.result(), 503, "shutting down")
        last = streamed.result().text.strip().split("\n\n")[-1]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_serve_says_what_it_cannot_do(inside_serve):
    assert "--host without a key; expected --api-key KEY" in inside_serve("--host", "0.0.0.0")
    assert "--adapter; expected NAME=FOLDER" in inside_serve("--adapter", "a+b=x")
    assert "--adapter; expected each name once" in inside_serve("--adapter", "a=x", "--adapter", "a=y")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port}; found" in inside_serve("--port", str(port))


@pytest.fixture
def inside_serve(monkeypatch, capsys):
    """Runs `meetjax serve` where it fails, in this process; returns the line it prints."""
    from meetjax.cli import main

    def run(*arguments):
        monkeypatch.delenv("MEETJAX_API_KEY", raising=False)
        monkeypatch.setattr(sys, "argv", ["meetjax", "serve", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run
