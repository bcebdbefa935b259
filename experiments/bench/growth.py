"""How the cost of a step grows: `python experiments/bench/growth.py [--out growth.json]`, also a part of `make bench`.

DPO of SmolLM2-135M-Instruct with LoRA on all linear sites, on made-up pairs (half of a row is its shared prompt), one thing varied
at a time; and decoding 8 rows under banks of more and more adapters. Seconds are medians of steps that are waited for; memory is
the compiled step's own account, arguments included. Prints a table and writes it as a list of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from overhead import SPECS
from rich.console import Console
from rich.table import Table

from meetjax.adapters.bank import init_bank
from meetjax.adapters.lora import LoraSpec
from meetjax.generate.decode import Asked, first_token, next_token
from meetjax.generate.sampling import RowSampling
from meetjax.models.decoder import unstack, unstack_bank
from meetjax.models.load import Model, load
from meetjax.objectives.preference import Dpo
from meetjax.train.flops import step_flops
from meetjax.train.memory import compile_step
from meetjax.train.optim import make_optimizer
from meetjax.train.stage import Optim, Stage
from meetjax.train.step import init_state, make_step, partition
from meetjax.types import Batch

LENGTHS, BATCHES, RANKS, BANKS = (128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32), (4, 8, 16, 32, 64), (1, 4, 16, 64)
LENGTH, BATCH, RANK = 256, 4, 16
STEPS = 3
DECODED, PROMPT = 16, 32


def pairs(length: int, batch: int, vocab: int) -> Batch:
    """Pairs whose two rows have `length` tokens each and share the first half of them."""
    half = length // 2
    tokens = np.random.default_rng(0).integers(10, vocab, (batch, 1, half + 2 * (length - half))).astype(np.int32)
    starts, ends = (np.tile(np.asarray(x, np.int32), (batch, 1)) for x in ((half, length), (length, 2 * length - half)))
    whole, shared = np.ones(batch, np.float32), np.full(batch, half, np.int32)
    return Batch(tokens, starts, ends, whole, common=shared, ref_logps=np.zeros((batch, 2), np.float32))


def clocked(run: Callable[[], Any], times: int) -> float:
    """Median seconds of one run; the first, which is not counted, compiles."""
    run()
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def training(model: Model, length: int, batch: int, rank: int) -> dict[str, float]:
    """{"seconds", "gb", "gflops"} of a step."""
    config = dataclasses.replace(model.config, remat="dots")
    spec = LoraSpec(rank=rank, alpha=2.0 * rank)
    stage = Stage((spec,), Dpo(beta=0.1), Optim(learning_rate=1e-4, schedule="constant", warmup=0.0))
    bank = init_bank(config, model.params, (spec,), model.tokenizer, jax.random.key(0))
    trainable, frozen = partition(model.params, bank, kinds=("lora",), base=False)
    tx = make_optimizer(stage.optim, 1000)
    step, state = make_step(config, stage, tx), init_state(jax.tree.map(jnp.copy, trainable), tx)
    given = jax.tree.map(jnp.asarray, pairs(length, batch, config.vocab))
    needed = compile_step(step, state, frozen, given)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, given)
        metrics["loss"].block_until_ready()

    seconds = clocked(run, STEPS)
    half = length // 2
    seen = half * (half + 1) // 2 + 2 * sum(range(half + 1, length + 1))
    useful = batch * step_flops(config, half + 2 * (length - half), seen, 2 * (length - half))
    return {"seconds": seconds, "gb": needed.bytes / 1e9, "gflops": useful / seconds / 1e9}


def decoding(model: Model, params: Any, kind: str, count: int) -> dict[str, float]:
    """{"seconds", "gb"} of a step of 8 rows under a bank of `count` adapters, each row under one of them at a strength of its own."""
    config, rows = dataclasses.replace(model.config, eos_token_ids=(), remat="none"), 8
    bank = init_bank(config, model.params, (SPECS[kind],), model.tokenizer, jax.random.key(0), count)
    gates = np.zeros((rows, count), np.float32)
    gates[np.arange(rows), np.arange(rows) % count] = np.linspace(0.25, 2.0, rows)
    tokens = np.random.default_rng(0).integers(10, config.vocab, (rows, PROMPT)).astype(np.int32)
    greedy = RowSampling(jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows), jnp.zeros(rows, jnp.int32))
    most = 2 * DECODED
    asked = Asked(greedy, unstack_bank(bank), jnp.asarray(gates), None, jnp.full(rows, most, jnp.int32))
    going = first_token(config, params, jnp.asarray(tokens), jnp.full(rows, PROMPT, jnp.int32), asked, most)
    needed = compile_step(next_token, config, params, going, asked)

    def run() -> None:
        nonlocal going
        going = next_token(config, params, going, asked)
        going.last.block_until_ready()

    return {"seconds": clocked(run, DECODED), "gb": needed.bytes / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/growth.json"))
    out = parser.parse_args().out
    model, console, rows = load("smollm2-135m-instruct"), Console(), []
    table = Table("step", "varied", "seconds", "GB", "useful GFLOP/s")

    def add(step: str, varied: str, found: dict[str, float]) -> None:
        rows.append({"step": step, "varied": varied} | {name: round(value, 4) for name, value in found.items()})
        table.add_row(step, varied, *(f"{found[name]:.3g}" if name in found else "" for name in ("seconds", "gb", "gflops")))
        console.print(f"{step}, {varied}: {found['seconds']:.3g} s, {found['gb']:.3g} GB")
        jax.clear_caches()

    for length in LENGTHS:
        add("DPO, 2 pairs, rank 16", f"length {length}", training(model, length, 2, RANK))
    for batch in BATCHES:
        add("DPO, length 256, rank 16", f"{batch} pairs", training(model, LENGTH, batch, RANK))
    for rank in RANKS:
        add("DPO, 4 pairs, length 256", f"rank {rank}", training(model, LENGTH, BATCH, rank))
    params = unstack(model.params)
    for kind in ("prompt", "edit", "lora"):
        for count in BANKS:
            add(f"decoding 8 rows under {kind}", f"bank of {count}", decoding(model, params, kind, count))
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
