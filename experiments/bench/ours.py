"""meetjax, told to train on given batches: `python ours.py FOLDER TASK DTYPE DATA SHAPE TOKENIZER BATCH`. TASK is dpo, sft or generate.

SHAPE: `-` for SmolLM2-135M-Instruct, else a published shape (random weights) with the tokenizer of a folder (`-`: SmolLM2's). `prepare`
and `write_rows` write to FOLDER what both sides start from: the model as a Hugging Face folder, a LoRA, and the rows of TASK as token ids.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file
from transformers import AutoTokenizer
from worker import serve

from meetjax.adapters.bank import init_bank
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.peft import lora_to_peft
from meetjax.data.loader import Plan, make_batches, pad_batch
from meetjax.data.tokenize import answer_ids, laid_lengths
from meetjax.generate.decode import generate_tokens, rounded
from meetjax.generate.sampling import RowSampling
from meetjax.models import sites
from meetjax.models.decoder import init_params, unstack
from meetjax.models.fingerprint import fingerprint
from meetjax.models.load import Model, load
from meetjax.models.published import find_config
from meetjax.models.save import save_model
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.flops import step_flops
from meetjax.train.memory import compile_step, peak_device_gb
from meetjax.train.optim import make_optimizer
from meetjax.train.stage import Data, Optim, Stage
from meetjax.train.step import init_state, make_step, partition
from meetjax.train.view import read_rows
from meetjax.types import Batch

FOLDER = Path(sys.argv[1])
TASK, DTYPE, DATA, SHAPE, TOKENIZER = sys.argv[2:7]
LORA = LoraSpec(rank=16, alpha=32.0, sites=sites.LINEAR)
BATCH, LENGTH = int(sys.argv[7]), 512
CPU = jax.default_backend() == "cpu"


def subject() -> Model:
    if SHAPE == "-":
        return load("smollm2-135m-instruct", dtype=DTYPE)
    tokenizer = load("smollm2-135m-instruct").tokenizer if TOKENIZER == "-" else AutoTokenizer.from_pretrained(TOKENIZER)
    config = find_config(SHAPE)
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(DTYPE), init_params(config, key)))(jax.random.key(0))
    return Model(SHAPE, config, params, tokenizer, fingerprint(config, params))


MODEL = subject()
CONFIG = dataclasses.replace(MODEL.config, dtype=DTYPE, remat="dots")
STAGE = Stage((LORA,), Sft() if TASK == "sft" else Dpo(beta=0.1), Optim(learning_rate=2e-4, schedule="constant", warmup=0.0))
SPLIT = read_rows(Data(path=DATA, held_out=500, max_length=LENGTH), STAGE, MODEL.tokenizer, Console(stderr=True))
ROWS, BUCKETS = SPLIT.train, SPLIT.buckets
BANK = init_bank(CONFIG, MODEL.params, (LORA,), MODEL.tokenizer, jax.random.key(0))
TRAINABLE, FROZEN = partition(MODEL.params, BANK, kinds=("lora",), base=False)
TX = make_optimizer(STAGE.optim, 1000)
STEP = make_step(CONFIG, STAGE, TX)


def prepare() -> None:
    """Writes the model and the LoRA."""
    save_model(MODEL, FOLDER / "model")
    assert BANK.lora is not None
    save_file(lora_to_peft(BANK.lora), FOLDER / "lora.safetensors")


def write_rows() -> list[int]:
    """Writes the rows; returns tokens of each one's prompt and longest answer."""
    rows = []
    for n in range(len(ROWS)):
        ids = [answer_ids(ROWS, n, c).tolist() for c in range(ROWS.starts.shape[1])]
        starts = ROWS.starts[n]
        names = ("chosen_ids", "rejected_ids")[: len(ids)]
        rows.append({"prompt_ids": ids[0][: starts[0]]} | {name: own[start:] for name, own, start in zip(names, ids, starts, strict=True)})
    (FOLDER / f"rows-{TASK}.json").write_text(json.dumps(rows))
    return ROWS.lengths.max(axis=1).tolist()


def epoch() -> list[list[int]]:
    """Rows of each batch of an epoch, cheap batches first."""
    return [plan.rows.tolist() for plan in sorted(make_batches(ROWS, BATCH, BUCKETS, 0), key=lambda plan: plan.length)]


def _batch(rows: list[int]) -> Batch:
    length = next(bucket for bucket in BUCKETS if bucket >= laid_lengths(ROWS)[rows].max())
    return jax.tree.map(jnp.asarray, pad_batch(ROWS, Plan(length, np.asarray(rows), len(rows)))[0])


def train(batches: list[list[int]]) -> dict[str, Any]:
    """Of training on these rows, by step: "seconds", "losses", "reference" (seconds of scoring), "tokens", "flops"; "compile": seconds."""
    state = init_state(jax.tree.map(jnp.copy, TRAINABLE), TX)
    out: dict[str, Any] = {"seconds": [], "losses": [], "reference": [], "tokens": [], "flops": [], "compile": 0.0}
    made = [_batch(rows) for rows in batches]

    def warm(batch: Batch) -> float:
        blank = dataclasses.replace(batch, ref_logps=jnp.zeros(batch.starts.shape)) if TASK == "dpo" else batch
        if TASK == "dpo":
            compiled_answer_logps(CONFIG, MODEL.params, None, batch).block_until_ready()
        return compile_step(STEP, state, FROZEN, blank).seconds

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        out["compile"] = sum(pool.map(warm, {batch.tokens.shape: batch for batch in made}.values()))
    for batch, rows in zip(made, batches, strict=True):
        begun = time.perf_counter()
        if TASK == "dpo":
            batch = dataclasses.replace(batch, ref_logps=compiled_answer_logps(CONFIG, MODEL.params, None, batch).block_until_ready())
        scored = time.perf_counter()
        state, metrics = STEP(state, FROZEN, batch)
        out["losses"].append(float(metrics["loss"]))
        out["seconds"].append(time.perf_counter() - scored)
        out["reference"].append(scored - begun)
        out["tokens"].append(int(ROWS.lengths[rows].sum()))
        out["flops"].append(sum(map(useful_flops, rows)))
    return out


def useful_flops(n: int) -> float:
    """What a step must spend on row n; what LoRA itself needs is not counted."""
    common, ends, starts = int(ROWS.common[n]), ROWS.lengths[n], ROWS.starts[n]
    own = [range(common + 1, int(end) + 1) for end in ends]
    seen = common * (common + 1) // 2 + sum(map(sum, own))
    return step_flops(CONFIG, common + sum(map(len, own)), seen, int((ends - starts).sum()))


def matmul(repeats: int = 10) -> float:
    """Median FLOPs a second of a product of two square matrices of random numbers of DTYPE."""
    side = 2048 if CPU else 8192
    x = jax.random.normal(jax.random.key(0), (side, side), DTYPE)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / float(np.median(seconds))


def _prompts(prompts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ids = [answer_ids(ROWS, n, 0)[: ROWS.starts[n, 0]] for n in prompts]
    width = rounded(max(map(len, ids)))
    return np.stack([np.pad(row, (0, width - len(row))) for row in ids]), np.asarray([len(row) for row in ids], np.int32)


def generate(prompts: list[int], new_tokens: int) -> float:
    """Seconds of greedy decoding of these rows' prompts."""
    tokens, lengths = _prompts(prompts)
    count = len(prompts)
    still = dataclasses.replace(CONFIG, eos_token_ids=(), remat="none")  # no row stops early
    rows = RowSampling(jnp.zeros(count), jnp.zeros(count, jnp.int32), jnp.ones(count), jnp.zeros(count, jnp.int32))
    run = partial(generate_tokens, still, PARTED, tokens, lengths, rows, max_new_tokens=new_tokens)
    if (key := (tokens.shape, new_tokens)) not in WARM:
        WARM.add(key)
        jax.block_until_ready(run())
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def recompiles() -> int:
    """Compilations while a tiny model with this vocabulary trains for an epoch, after one batch of each length."""
    config = dataclasses.replace(CONFIG, width=16, hidden=32, layers=1, heads=2, kv_heads=1, head_width=8)
    params = init_params(config, jax.random.key(0))
    bank = init_bank(config, params, (LoraSpec(rank=2),), MODEL.tokenizer, jax.random.key(0))
    trainable, frozen = partition(params, bank, kinds=("lora",), base=False)
    step, state = make_step(config, STAGE, TX), init_state(trainable, TX)
    count, plans = 0, make_batches(ROWS, BATCH, BUCKETS, 0)

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(heard)
    warm = list({plan.length: plan for plan in plans}.values())
    for plan in [*warm, None, *plans]:
        if plan is None:
            count = 0
            continue
        batch = _batch(plan.rows.tolist())
        batch = dataclasses.replace(batch, ref_logps=jnp.zeros(batch.starts.shape)) if TASK == "dpo" else batch
        state, _ = step(state, frozen, batch)
    return count


PARTED = unstack(MODEL.params) if TASK == "generate" else {}
WARM: set[Any] = set()

if __name__ == "__main__":
    serve(
        {
            "prepare": prepare,
            "write_rows": write_rows,
            "device": lambda: jax.devices()[0].device_kind,
            "epoch": epoch,
            "train": train,
            "matmul": matmul,
            "generate": generate,
            "recompiles": recompiles,
        },
        peak_device_gb,
    )
