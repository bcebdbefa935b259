"""`meetjax serve` as a user runs it: a process with a real engine, real adapters, and an end that finishes what is open."""

from __future__ import annotations

import json
import os
import signal
import socket
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from meetjax.adapters.io import save_adapters
from meetjax.generate.requests import Request, generate_texts
from tests.conftest import random_bank
from tests.serve.loopback import until

NAMES = ("lora", "edit")
STRENGTHS = ((0.0, 0.0), (1.0, 0.0), (-0.5, 1.5), (0.7, 0.7))


@pytest.fixture(scope="module")
def banks(model):
    return {name: random_bank(model.config, (name,), entries=(0,), seed=i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def process(model, model_folder, banks, command, tmp_path_factory):
    """A server with two adapters: its url and pid; the last test ends it."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, bank in banks.items():
        save_adapters(folder / name, bank, base=model.name, fingerprint=model.fingerprint)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    adapters = [f"--adapter={name}={folder / name}" for name in NAMES]
    pid = command.start("serve", "--model", model_folder, *adapters, "--port", port, "--slots", 4, "--capacity", 64, "--no-page")
    it = types.SimpleNamespace(url=f"http://127.0.0.1:{port}", pid=pid, running=True)
    try:
        until(lambda: healthy(it.url), 120)
        yield it
    finally:
        if it.running:
            os.kill(pid, signal.SIGKILL)
            command.finish()


def healthy(url):
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_mixed_company_gets_what_each_gets_alone(process, model, banks):
    """Greedy answers of the openai client at four strengths at once are those of `generate_texts`."""
    from meetjax.adapters.algebra import stack

    requests = [Request("a short answer?", gates=gates) for gates in STRENGTHS]
    expected = [one.text for one in generate_texts(model, requests, adapters=stack(list(banks.values())), max_new_tokens=12)]
    assert len(set(expected)) > 1

    def ask(gates):
        with openai.OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0) as client:
            chunks = client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "a short answer?"}], temperature=0, max_tokens=12, stream=True,
                extra_body={"adapters": dict(zip(NAMES, gates, strict=True))},
            )  # fmt: skip
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, STRENGTHS)) == expected
    assert "meetjax_engine_compiles_total 0.0" in httpx.get(process.url + "/metrics").text


def test_sigterm_finishes_what_is_open(process, command):
    """A stream that has begun goes on to its end; then the process ends, and its log is JSON, a line a request."""
    body = {"model": "base", "prompt": "the cat", "temperature": 0, "max_tokens": 50, "stream": True, "adapters": {"edit": 1}}
    with httpx.stream("POST", process.url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(process.pid, signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    done, process.running = command.finish(), False
    assert done.status in (0, -signal.SIGTERM)
    logged = [json.loads(line) for line in done.err.splitlines()]
    assert logged[0]["event"] == "serving"
    assert logged[-1]["event"] == "request"
    expected = {"status": 200, "path": "/v1/completions", "adapters": {"edit": 1.0}, "stream": True}
    assert logged[-1] | expected == logged[-1]
    assert logged[-1]["completion_tokens"] >= 1
