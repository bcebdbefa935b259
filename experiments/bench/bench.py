"""meetjax beside trl + peft and transformers on this machine, in alternation: `make bench DATA=HH.jsonl.gz`.

    python experiments/bench/bench.py --data HH.jsonl.gz [--rounds 5] [--only dpo-f32,sft,...] [--out runs/bench]

SmolLM2-135M-Instruct, LoRA r16 on all linear sites, HH harmless, 8 pairs a batch, at most 512 tokens; with `--shape` random weights of a
published shape, in bfloat16, for accelerators. Each side composes the batches of an epoch in its own way (trl: in random order, and,
for information, sorted by length), and each round trains on two batches that are as far below the middle of the epoch's costs as
above it. Steps are timed after a warm-up; scoring by the reference is part of the time on both sides. Writes summary.json, a list of
{"name", "goal", "measured", "ok"}, and log files.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from worker import Broken, Worker

from meetjax.models.sources import cache_dir

HERE = Path(__file__).parent
CONSOLE = Console()
ROOM = 32e9
"""Bytes of memory under which trl trains on a float32 batch in two parts: 8 pairs of 512 tokens took it beyond 22 GB."""
PARTS = ("dpo-f32", "dpo-bf16", "sft-f32", "losses", "generate", "decode", "first-step", "recompiles", "growth")
SEEDS = (0, 1, 2)
"""Of the runs whose first step is timed: each seed starts with a batch of another length."""


class Bench:
    """Rows of the table, and the two sides that a part needs."""

    def __init__(self, asked: argparse.Namespace):
        self.data, self.out, self.rounds, self.batch = asked.data, asked.out, asked.rounds, asked.batch
        self.subject = [asked.shape, asked.tokenizer, str(asked.batch)]
        self.decoding = "float32" if asked.shape == "-" else "bfloat16"
        self.rows = [] if asked.only == ",".join(PARTS) else kept_rows(self.out / "summary.json")
        self.device = ""
        self.started: list[Worker] = []
        self.out.mkdir(parents=True, exist_ok=True)

    def ours(self, task: str, dtype: str) -> Worker:
        return self._start("ours.py", task, dtype, self.data, *self.subject)

    def theirs(self, task: str, dtype: str, variant: str) -> Worker:
        return self._start("theirs.py", task, dtype, variant)

    def _start(self, file: str, *arguments: str) -> Worker:
        self.started.append(Worker(HERE / file, str(self.out), *arguments, log=(self.out / file).with_suffix(".log")))
        return self.started[-1]

    def stop(self) -> None:
        """Ends what a broken part left behind."""
        for side in self.started:
            side.process.kill()

    def add(self, name: str, goal: str, measured: float, ok: bool, detail: str = "") -> None:
        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows.append({"name": name, "goal": goal, "measured": float(f"{measured:.4g}"), "ok": ok, "detail": detail})
        CONSOLE.print(f"{name}: {measured:.3g} ({verdict(goal, ok)}) {detail}")
        (self.out / "summary.json").write_text(json.dumps(self.rows, indent=1) + "\n")

    def training(self, task: str, dtype: str, goal: float) -> None:
        """Rounds of two batches a side; rows for throughput, and for float32 DPO memory and the share of the matmul rate."""
        ours = self.ours(task, dtype)
        lengths = ours.ask("write_rows")
        epoch = ours.ask("epoch")
        sampled = spaced(epoch, self.rounds)
        unit = "pairs/s" if task == "dpo" else "tokens/s"
        first = ours.ask("train", batches=[batch for pair in sampled for batch in pair])  # every program compiled and run once
        CONSOLE.print(f"meetjax: {first['compile']:.0f} s of compiling")
        shuffled = shuffled_epoch(lengths, self.batch)
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        grouped = [by_length[i : i + self.batch] for i in range(0, len(lengths) - self.batch + 1, self.batch)]
        variants = {"autocast": "-", "pure": "pure"} if dtype == "bfloat16" else {"plain": "-"}
        # No slower where fresh memory is slow.
        saving = {f"{name}, checkpointed": f"{set_},checkpointed" for name, set_ in variants.items()}
        if task == "dpo" and dtype == "float32" and os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < ROOM:
            variants = {"in two parts": "halved"}
        variants |= saving
        variants |= {f"{name}, reference ahead": f"{set_},precompute" for name, set_ in variants.items()} if task == "dpo" else {}

        def timed(side: Worker, batches: list[list[int]]) -> float:
            found = side.ask("train", batches=batches, learning_rate=2e-4)
            return work(batches, lengths, task) / (sum(found["seconds"]) + found["reference"])

        def warmed(variant: str, batches: list[list[int]]) -> Worker:
            side = self.theirs(task, dtype, variant)
            timed(side, grouped[:1] if self.device == "cpu" else batches)  # kernels of a GPU are chosen for each shape, as ours were
            return side

        rates: dict[str, float] = {}
        (middle,) = spaced(grouped, 1)
        for name, variant in variants.items():
            side = warmed(variant, middle)
            rates[name] = timed(side, middle)
            CONSOLE.print(f"trl {name}: {rates[name]:.3g} {unit}, sorted by length")
            side.close()  # what it holds is memory that the next one may need
        best = max(rates, key=rates.__getitem__)
        rounds = list(zip(sampled, spaced(shuffled, self.rounds), spaced(grouped, self.rounds), strict=True))
        theirs = warmed(variants[best], [batch for _, given, ordered in rounds for batch in given + ordered])
        mine, other, sorted_, matmul, shares, tokens = [], [], [], [], [], []
        for own, given, ordered in rounds:
            matmul.append(ours.ask("matmul"))
            found = ours.ask("train", batches=own)
            spent = sum(found["seconds"])
            shares.append(sum(found["flops"]) / spent / matmul[-1])
            tokens.append(sum(found["tokens"]) / spent)
            mine.append(work(own, lengths, task) / (spent + sum(found["reference"])))
            other.append(timed(theirs, given))
            sorted_.append(timed(theirs, ordered))
            said = f"{mine[-1]:.3g} against {other[-1]:.3g} (sorted {sorted_[-1]:.3g}) {unit}"
            CONSOLE.print(f"{said}, {shares[-1]:.2f} of {matmul[-1] / 1e9:.4g} GFLOP/s")
        for rival, name, wanted in ((other, "", goal), (sorted_, ", its batches sorted by length", None)):
            ratios = [a / b for a, b in zip(mine, rival, strict=True)]
            detail = f"{median(mine):.3g} against {median(rival):.3g} {unit} ({best}); rounds {' '.join(f'{r:.2f}' for r in ratios)}"
            name = f"{task} {unit}, {dtype}, against trl{name}"
            self.add(name, f">= {wanted}x" if wanted else "none", median(ratios), median(ratios) >= (wanted or 0), detail)
        peaks = ours.close(), theirs.close()
        if task == "dpo" and dtype == self.decoding:
            share = peaks[0] / peaks[1]
            name, detail = f"peak memory of DPO, {dtype}, against trl", f"{peaks[0]:.2f} against {peaks[1]:.2f} GB"
            self.add(f"{name} as it is fastest", "<= 0.25x", share, share <= 0.25, detail)
            if "checkpointed" not in best:
                side = self.theirs(task, dtype, f"{variants[best]},checkpointed")
                rate = timed(side, rounds[0][1])
                peak = side.close()
                detail = f"{peaks[0]:.2f} against {peak:.2f} GB, at {rate:.3g} in place of {other[0]:.3g} {unit}"
                self.add(f"{name} with gradient checkpointing, its default", "none", peaks[0] / peak, True, detail)
            detail = f"{median(matmul) / 1e12:.3g} TFLOP/s; {median(tokens):.4g} tokens/s; rounds {' '.join(f'{s:.2f}' for s in shares)}"
            self.add(f"useful FLOPs a second of DPO over the matmul rate, {dtype}", ">= 0.6", median(shares), median(shares) >= 0.6, detail)

    def losses(self, steps: int = 30) -> None:
        """Both sides on the same batches in the same order, from the same LoRA."""
        ours, theirs = self.ours("dpo", "float32"), self.theirs("dpo", "float32", "-")
        epoch = ours.ask("epoch")
        batches = [epoch[i] for i in np.linspace(0, len(epoch) // 4, steps).astype(int)]  # the cheaper quarter, to save time
        mine = ours.ask("train", batches=batches)["losses"]
        other = theirs.ask("train", batches=batches, learning_rate=2e-4)["losses"]
        worst = max(abs(a - b) for a, b in zip(mine, other, strict=True))
        self.add(
            f"largest difference of the loss over {steps} steps", "<= 1e-3", worst, worst <= 1e-3, f"last {mine[-1]:.5f}, {other[-1]:.5f}"
        )
        ours.close()
        theirs.close()

    def generate(self) -> None:
        for dtype in dict.fromkeys((self.decoding, "bfloat16")):
            ours, theirs = self.ours("generate", dtype), self.theirs("generate", dtype, "-")
            asked = {"prompts": list(range(8)), "new_tokens": 128}
            theirs.ask("generate", **asked)  # its first call is slower
            seconds = [(ours.ask("generate", **asked), theirs.ask("generate", **asked)) for _ in range(self.rounds)]
            ratios = [other / own for own, other in seconds]
            detail = f"{8 * 128 / median(own for own, _ in seconds):.0f} tokens/s; rounds {' '.join(f'{r:.2f}' for r in ratios)}"
            name = f"generation of 8 x 128 tokens, {dtype}, against transformers"
            self.add(name, ">= 3x", median(ratios), median(ratios) >= 3, detail)
            ours.close()
            theirs.close()

    def decode(self) -> None:
        """The engine's step, in processor seconds: those on the clock are the neighbours' too."""
        for row in self._from_process("overhead.py", self.out / "overhead" / "summary.json", self.out / "overhead"):
            self.add(row["name"], row["goal"], row["measured"], row["ok"], row["detail"])

    def first_step(self) -> None:
        recipe = HERE.parent / "lora_dpo_hh.py"
        with tempfile.TemporaryDirectory() as folder:
            for name, goal in (("cold", 60), ("with the compile cache", 15)):
                seconds = [first_step(recipe, self.data, Path(folder) / str(seed), seed) for seed in SEEDS]
                detail = f"seeds {' '.join(map(str, SEEDS))}: {' '.join(f'{s:.1f}' for s in seconds)}"
                self.add(f"seconds to the first step, {name}", f"<= {goal}", median(seconds), median(seconds) <= goal, detail)

    def recompiles(self) -> None:
        ours = self.ours("dpo", "float32")
        count = ours.ask("recompiles")
        self.add("compilations after warm-up over an epoch", "0", count, count == 0)
        ours.close()

    def growth(self) -> None:
        self._from_process("growth.py", self.out / "growth.json", self.out / "growth.json")

    def _from_process(self, file: str, written: Path, out: Path) -> list[dict[str, Any]]:
        if subprocess.run([sys.executable, str(HERE / file), "--out", str(out)], check=False).returncode:
            raise Broken(f"{file} ended early")
        return json.loads(written.read_text())


def kept_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of parts that ran before: `--only` adds to them."""
    return json.loads(file.read_text()) if file.exists() else []


def first_step(recipe: Path, data: str, caches: Path, seed: int) -> float:
    """Seconds from the start of `meetjax align` to its first step being logged. Of what is in `caches` the model is no news, and no
    reference is known.
    """
    out = caches / f"run-{time.time_ns()}"
    if not caches.exists():
        caches.mkdir()
        for model in cache_dir().glob("*.gguf"):
            (caches / model.name).symlink_to(model)
    (caches / "reference.sqlite").unlink(missing_ok=True)
    changed = {"data.path": data, "data.max_length": 512, "train.batch_size": 8, "train.steps": 1000, "train.seed": seed, "out": out}
    settings = [f"{field}={value}" for field, value in changed.items()]
    command = [sys.executable, "-m", "meetjax.cli", "align", str(recipe)] + [word for s in settings for word in ("--set", s)]
    environment = os.environ | {"MEETJAX_CACHE": str(caches)}
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics = out / "stage-0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n")):
        if process.poll() is not None:
            raise Broken("meetjax align ended before its first step")
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    process.terminate()
    process.wait()
    return seconds


def verdict(goal: str, ok: bool) -> str:
    return "for information" if goal == "none" else f"goal {goal} {'met' if ok else 'MISSED'}"


def work(batches: list[list[int]], lengths: list[int], task: str) -> float:
    """Pairs, or tokens of prompts and answers, in these batches."""
    return float(sum(len(rows) if task == "dpo" else sum(lengths[n] for n in rows) for rows in batches))


def spaced(batches: list[list[int]], rounds: int) -> list[list[list[int]]]:
    """Two batches a round, i and its mirror image, at even places of an epoch that is ordered by cost."""
    places = ((np.arange(2 * rounds) + 0.5) / (2 * rounds) * len(batches)).astype(int)
    return [[batches[places[i]], batches[places[-1 - i]]] for i in range(rounds)]


def shuffled_epoch(lengths: list[int], batch: int) -> list[list[int]]:
    """Batches of a shuffled epoch, ordered by the longest row of each."""
    order = np.random.default_rng(0).permutation(len(lengths)).tolist()
    batches = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
    return sorted(batches, key=lambda rows: max(lengths[n] for n in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="HH harmless, harmless-base/test.jsonl.gz")
    parser.add_argument("--rounds", type=int, default=5)
    told = f"parts to run, of {', '.join(PARTS)} and sft-bf16; their rows replace those of the last run"
    parser.add_argument("--only", default=",".join(PARTS), help=told)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--shape", default="-", help="a published shape, such as llama-3.2-1b, with random weights; - for SmolLM2")
    parser.add_argument("--tokenizer", default="-", help="folder of the tokenizer for --shape; - for SmolLM2's")
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    asked = parser.parse_args()
    bench = Bench(asked)
    prepared = bench.ours("dpo", bench.decoding)
    prepared.ask("prepare")
    prepared.ask("write_rows")
    bench.device = prepared.ask("device")
    prepared.close()
    runs = {
        "dpo-f32": lambda: bench.training("dpo", "float32", 6.0),
        "dpo-bf16": lambda: bench.training("dpo", "bfloat16", 5.0),
        "sft-f32": lambda: bench.training("sft", "float32", 2.5),
        "sft-bf16": lambda: bench.training("sft", "bfloat16", 2.5),
        "losses": bench.losses,
        "generate": bench.generate,
        "decode": bench.decode,
        "first-step": bench.first_step,
        "recompiles": bench.recompiles,
        "growth": bench.growth,
    }
    broken = []
    for part in asked.only.split(","):
        CONSOLE.rule(part)
        try:
            runs[part]()
        except Broken as error:
            bench.stop()
            broken.append(f"{part}: {error}")
            CONSOLE.print(broken[-1])
    table = Table("what", "measured", "", title=f"{machine()}; {bench.device}")
    for row in bench.rows:
        table.add_row(row["name"], f"{row['measured']:.4g}", verdict(row["goal"], row["ok"]))
    CONSOLE.print(table)
    if broken:
        raise SystemExit("not measured: " + "; ".join(broken))


def machine() -> str:
    """Cores, processor and versions, for the head of the table."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "trl", "peft", "transformers"))
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else 'CPU'}; {versions}"


if __name__ == "__main__":
    main()
