"""The server under load on this machine: `make load`.

    python experiments/bench/load.py [--minutes 5] [--clients 64] [--kinds 48] [--slots 16] [--llama-server FILE] [--out runs/load]

`meetjax serve` with SmolLM2-135M-Instruct and 8 adapters (3 LoRA, 3 edits, 2 soft prompts; random, as large as trained ones) answers
`--clients` streaming clients over the loopback, in processes apart. Each client asks one of `--kinds` requests after the other, drawn at
random: a prompt with strengths of one or two adapters, one in eight with a logit dial, greedy. Afterwards each answer is held
against the one that the same request gets alone, and against `generate_texts` without a server. Beside it transformers' `generate`
answers the same prompts without adapters, one by one and in batches of `--slots`, and llama.cpp's server, where its program is given, the
same clients for a minute without adapters, from the model's GGUF file and so with 4-bit weights. Writes summary.json, a list of
{"name", "goal", "measured", "ok"}, and table.md.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import psutil
from rich.console import Console

import meetjax
from meetjax.adapters.algebra import stack
from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.io import save_adapters
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.generate.requests import Request, generate_texts
from meetjax.models.save import save_model
from meetjax.models.sources import find_source

CONSOLE = Console()
MODEL = "smollm2-135m-instruct"
PROMPTS = Path(__file__).parent.parent / "concise_prompts.txt"
SPECS = (
    {f"lora{i}": LoraSpec(rank=8) for i in range(3)}
    | {f"edit{i}": EditSpec() for i in range(3)}
    | {f"prompt{i}": PromptSpec(text=text) for i, text in enumerate(("A helpful answer:", "In one short sentence:"))}
)
NOISE = {"lora": 0.01, "edit": 0.05, "prompt": 0.0}
"""Standard deviation of what is added to a fresh adapter, which would be neutral: enough to change answers, not to break them."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One request that clients may make."""

    prompt: str
    adapters: tuple[tuple[str, float], ...]
    dial: float | None

    def plain(self, tokens: int) -> dict[str, Any]:
        """Without what only meetjax has."""
        wish = {"model": "base", "messages": [{"role": "user", "content": self.prompt}], "temperature": 0, "max_tokens": tokens}
        return wish | {"stream": True, "stream_options": {"include_usage": True}}

    def body(self, tokens: int) -> dict[str, Any]:
        wish = self.plain(tokens) | {"adapters": dict(self.adapters)}
        return wish if self.dial is None else wish | {"logit_dial": self.dial}


@dataclasses.dataclass
class Reply:
    """What a client saw: seconds to the first text and to the end; error: what went wrong."""

    kind: int
    text: str = ""
    tokens: int = 0
    first: float = float("nan")
    seconds: float = 0.0
    done: bool = False
    error: str = ""


def make_adapters(model: Any, out: Path) -> dict[str, Any]:
    """Writes eight adapters as folders; returns their banks by name."""
    banks = {}
    for i, (name, spec) in enumerate(SPECS.items()):
        bank, draw = init_bank(model.config, model.params, (spec,), model.tokenizer, jax.random.key(i)), np.random.default_rng(i)
        noise = NOISE[name[:-1]]
        banks[name] = jax.tree.map(lambda x, n=noise, d=draw: np.asarray(x) + n * d.normal(size=x.shape).astype(np.float32), bank)
        save_adapters(out / "adapters" / name, banks[name], base=model.name, fingerprint=model.fingerprint)
    return banks


def draw_kinds(count: int) -> list[Kind]:
    prompts, draw = [line for line in PROMPTS.read_text().splitlines() if line.strip()], np.random.default_rng(0)
    kinds = []
    for i in range(count):
        names = draw.choice(list(SPECS), 1 + i % 2, replace=False)
        chosen = tuple((str(n), float(draw.choice(np.arange(0.25 if n.startswith("prompt") else -1, 2.01, 0.25)))) for n in names)
        kinds.append(Kind(str(draw.choice(prompts)), chosen, 1.2 if i % 8 == 7 else None))
    return kinds


class Server:
    """A server in a process of its own, from when it answers /health; command: without the port, which is its last argument."""

    def __init__(self, command: list[str], log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.log, begun = f"http://127.0.0.1:{self.port}", log.open("w"), time.monotonic()
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stdout=self.log, stderr=self.log)
        while not self._answers():
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended; see {log}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - begun
        self.memory: list[float] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url + "/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def _watch(self) -> None:
        own = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            self.memory.append(own.memory_info().rss / 2**20)
            time.sleep(1.0)

    def count(self, name: str) -> float:
        lines = httpx.get(self.url + "/metrics", timeout=30).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"meetjax_engine_{name} "))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.log.close()
        return code


def serve(out: Path, slots: int, clients: int) -> Server:
    """`meetjax serve` with the adapters of `make_adapters`."""
    adapters = [f"--adapter={name}={out / 'adapters' / name}" for name in SPECS]
    command = [sys.executable, "-m", "meetjax.cli", "serve", "--slots", str(slots), "--queue", str(clients), "--capacity", "512"]
    return Server([*command, "--no-page", *adapters], out / "server.log")


def serve_llama(program: Path, out: Path, slots: int) -> Server | None:
    """llama.cpp's server with as many slots; None where the model was not read from a GGUF file."""
    source = find_source(MODEL)
    if not source.is_gguf:
        return None
    command = [str(program), "-m", str(source.path), "--parallel", str(slots), "--ctx-size", str(slots * 512), "--host", "127.0.0.1"]
    return Server(command, out / "llama.log")


async def ask(client: httpx.AsyncClient, kind: int, body: dict[str, Any]) -> Reply:
    """One streamed request."""
    reply, begun = Reply(kind), time.monotonic()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                reply.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    reply.done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    reply.error = reply.error or chunk.get("error", {}).get("message", "")
                    for choice in chunk.get("choices", ()):
                        reply.text += choice["delta"].get("content") or ""
                        if reply.text and np.isnan(reply.first):
                            reply.first = time.monotonic() - begun
                    reply.tokens = (chunk.get("usage") or {}).get("completion_tokens", reply.tokens)
    except httpx.HTTPError as error:
        reply.error = repr(error)
    reply.seconds = time.monotonic() - begun
    return reply


async def storm(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> list[Reply]:
    """All replies of `clients` clients that ask until the time is up, and wait for the last answer."""
    replies, end = [], time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = np.random.default_rng(number)
        async with httpx.AsyncClient(base_url=url, timeout=600) as own:
            while time.monotonic() < end:
                kind = int(draw.integers(len(bodies)))
                replies.append(await ask(own, kind, bodies[kind]))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return replies


async def one_by_one(url: str, bodies: list[dict[str, Any]]) -> list[Reply]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return [await ask(client, kind, body) for kind, body in enumerate(bodies)]


def offline(model: Any, banks: dict[str, Any], kinds: list[Kind], tokens: int) -> list[str]:
    """The same answers without a server, one at a time."""
    bank, names, texts = stack(list(banks.values())), list(banks), []
    for kind in kinds:
        gates = tuple(dict(kind.adapters).get(name, 0.0) for name in names)
        request = Request(kind.prompt, gates=gates, dial=kind.dial)
        texts.append(generate_texts(model, [request], adapters=bank, max_new_tokens=tokens)[0].text)
    return texts


THEIRS = """
import json, sys, time, torch, transformers
folder, prompts, batch, tokens = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
def answer(texts):
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True) for t in texts]
    given = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    begun = time.perf_counter()
    out = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new = out[:, given["input_ids"].shape[1]:]
    return int((new != tokenizer.pad_token_id).sum()), time.perf_counter() - begun
answer(prompts[:batch])
found, end = [], time.perf_counter() + 45
while time.perf_counter() < end:
    begin = len(found) * batch % len(prompts)
    found.append(answer((prompts * 2)[begin:begin + batch]))
print(json.dumps({"rate": sum(n for n, _ in found) / sum(s for _, s in found), "seconds": sorted(s for _, s in found)}))
"""


def theirs(out: Path, kinds: list[Kind], batch: int, tokens: int) -> dict[str, Any] | None:
    """Tokens a second of transformers' generate on the same prompts without adapters; None where there is no torch."""
    (out / "prompts.json").write_text(json.dumps([kind.prompt for kind in kinds]))
    command = [sys.executable, "-c", THEIRS, str(out / "model"), str(out / "prompts.json"), str(batch), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"}, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def summarise(replies: list[Reply], wall: float) -> tuple[float, dict[str, float]]:
    """(tokens a second, quantiles by name in seconds)."""
    done = [reply for reply in replies if reply.done]
    series = {"first token, s": [reply.first for reply in done], "whole answer, s": [reply.seconds for reply in done]}
    quantiles = {f"{n}, {q}": float(np.nanpercentile(x, p)) for n, x in series.items() for q, p in (("median", 50), ("p99", 99))}
    return sum(reply.tokens for reply in replies) / wall, quantiles


def line(side: str, rate: float, values: Iterable[float]) -> str:
    """A row of the table."""
    return f"| {side} | {rate:.1f} | " + " | ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kinds", type=int, default=48)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    model = meetjax.load(MODEL)
    banks, kinds = make_adapters(model, asked.out), draw_kinds(asked.kinds)
    bodies = [kind.body(asked.tokens) for kind in kinds]
    server = serve(asked.out, asked.slots, asked.clients)
    CONSOLE.print(f"ready after {server.seconds:.0f} s; {asked.kinds} requests alone")
    alone = asyncio.run(one_by_one(server.url, bodies))
    compiles, mark, begun = server.count("compiles_total"), len(server.memory), time.monotonic()
    CONSOLE.print(f"{asked.clients} clients for {asked.minutes:g} minutes")
    replies = asyncio.run(storm(server.url, bodies, asked.clients, 60 * asked.minutes))
    wall, memory = time.monotonic() - begun, server.memory[mark:]
    compiled = server.count("compiles_total") - compiles
    code = server.stop()
    CONSOLE.print("the same answers without a server")
    texts = offline(model, banks, kinds, asked.tokens)
    rows: list[dict[str, Any]] = []

    def add(name: str, goal: str, measured: float, ok: bool | None) -> None:
        rows.append({"name": name, "goal": goal, "measured": round(float(measured), 4), "ok": ok})
        CONSOLE.print(f"{name}: {measured:.4g} (goal {goal}) {'-' if ok is None else 'met' if ok else 'MISSED'}")

    failed = [reply.error or "not ended" for reply in replies if reply.error or not reply.done]
    mixed = sum(reply.text != alone[reply.kind].text for reply in replies if reply.done)
    differ = sum(reply.text != text for reply, text in zip(alone, texts, strict=True))
    third = max(1, len(memory) // 3)
    growth = max(memory[-third:]) / max(memory[:third]) - 1
    add("requests answered under load", f">= {asked.clients}", len(replies), len(replies) >= asked.clients)
    add("errors and dropped streams", "0", len(failed), not failed)
    add("answers unlike the same request alone", "0", mixed, mixed == 0)
    add("answers alone unlike generate_texts", "0", differ, differ == 0)
    add("programs compiled after warm-up", "0", compiled, compiled == 0)
    add("growth of memory, last third over first", "<= 0.02", growth, growth <= 0.02)
    add("exit status after SIGTERM under no load", "0 or SIGTERM", code, code in (0, -signal.SIGTERM, 128 + signal.SIGTERM))
    ours, quantiles = summarise(replies, wall)
    lines = ["| side | tokens/s | " + " | ".join(quantiles) + " |", "|" + " --- |" * (2 + len(quantiles))]
    lines.append(line(f"meetjax serve, {asked.clients} clients, {asked.slots} slots, 8 adapters mixed, float32", ours, quantiles.values()))
    add("tokens a second", "in the table", ours, None)
    for name, value in quantiles.items():
        add(name, "in the table", value, None)
    llama = serve_llama(asked.llama_server, asked.out, asked.slots) if asked.llama_server else None
    side = f"llama.cpp's server, {asked.clients} clients, {asked.slots} slots, no adapter, 4-bit weights"
    if llama is None:
        lines.append(f"| {side} | not run: no llama-server or no GGUF file |" + " - |" * len(quantiles))
    else:
        begun = time.monotonic()
        theirs_too = asyncio.run(storm(llama.url, [kind.plain(asked.tokens) for kind in kinds], asked.clients, 60))
        rate, found = summarise(theirs_too, time.monotonic() - begun)
        llama.stop()
        lines.append(line(side, rate, found.values()))
        add(f"tokens a second over {side}", "in the table", ours / rate, None)
    save_model(model, asked.out / "model")
    for batch in (1, asked.slots):
        found = theirs(asked.out, kinds, batch, asked.tokens)
        side = f"transformers generate, no adapter, batches of {batch}"
        if found is None:
            lines.append(f"| {side} | not run: no torch |" + " - |" * len(quantiles))
            continue
        seconds = found["seconds"]
        lines.append(line(side, found["rate"], (np.nan, np.nan, seconds[len(seconds) // 2], seconds[-1])))
        add(f"tokens a second over {side}", "in the table", ours / found["rate"], None)
    (asked.out / "table.md").write_text("\n".join(lines) + "\n")
    (asked.out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    (asked.out / "failures.json").write_text(json.dumps(failed, indent=1) + "\n")
    CONSOLE.print("\n".join(lines), markup=False)
    sys.exit(0 if all(row["ok"] in (True, None) for row in rows) else 1)


if __name__ == "__main__":
    main()
