"""The laws that everything rests on, checked on a real model in about a minute."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.tree import Bank
from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.records import read_records
from meetjax.data.tokenize import tokenize_records
from meetjax.models.decoder import apply, decode_step, hidden_states, prefill, unstack
from meetjax.models.layers import logits
from meetjax.models.load import Model, load
from meetjax.objectives.logps import compiled_answer_logps as logps
from meetjax.objectives.preference import Dpo
from meetjax.train.sharding import base_shardings, make_mesh, put_batch, replicated
from meetjax.train.step import Parts, make_gradient, partition
from meetjax.types import Batch

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference relative to the largest value: another order of the same sums, through every layer of a real model."""
PAIRS = 4


def run(source: str, console: Console | None = None) -> bool:
    """Prints a line a law with the measured difference; True when all hold."""
    console, begun, passed = console or Console(), time.monotonic(), True
    model = load(source)
    tolerance = TOLERANCE[model.config.dtype]
    for name, measured, bound in _laws(model, tolerance):
        ok = measured <= bound
        passed &= ok
        mark = "[green]pass[/]" if ok else "[red]FAIL[/]"
        console.print(f"{mark}  {name}  [dim]difference {measured:.1e}, at most {bound:.0e}[/]", highlight=False)
    verdict = "all laws hold" if passed else "some laws FAIL"
    console.print(f"{verdict}: {model.name}, {jax.default_backend()} x {jax.device_count()}, {time.monotonic() - begun:.0f} s")
    return passed


def _distance(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the trees, relative to the largest value; infinite where a number is not finite."""
    worst, scale = 0.0, 1e-30
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.inf
        worst, scale = max(worst, float(np.max(np.abs(a - b), initial=0))), max(scale, float(np.max(np.abs(b), initial=0)))
    return worst / scale


def _laws(model: Model, tolerance: float) -> Iterator[tuple[str, float, float]]:
    config, params = model.config, model.params
    records, _ = read_records("concise", "pair", limit=PAIRS)
    rows, _ = tokenize_records(
        records, model.tokenizer, min(config.max_position, 1024), "auto" if model.tokenizer.chat_template else "none"
    )
    batch, chosen = next(iter(eval_batches(rows, PAIRS, choose_buckets(rows))))
    key = jax.random.key(0)
    fresh = {
        "lora": init_bank(config, params, (LoraSpec(4, 8.0, ("q", "v")),), model.tokenizer, key),
        "edit": init_bank(config, params, (EditSpec(),), model.tokenizer, key),
        "identity": init_bank(config, params, (IdentitySpec(),), model.tokenizer, key),
    }
    base = np.asarray(logps(config, params, None, batch))
    for kind, bank in fresh.items():
        scores = np.asarray(logps(config, params, bank, batch))
        loss, _, metrics = Dpo()(scores, dataclasses.replace(batch, ref_logps=base))
        yield f"step 0, {kind}: DPO loss is ln 2", abs(float(loss) / PAIRS - math.log(2)), 1e-3
        yield f"step 0, {kind}: rewards are 0", max(abs(float(metrics[f"rewards/{side}"][0])) for side in ("chosen", "rejected")), 1e-3
    forward = partial(jax.jit, static_argnums=0)(apply)
    tokens = batch.tokens[:, 0, :64]
    alone = dataclasses.replace(rows, shared_prompt=False)
    apart, order = next(iter(eval_batches(alone, PAIRS, choose_buckets(alone))))  # sorted by other lengths
    plain = forward(config, params, tokens)
    gates = np.zeros((PAIRS, 1), np.float32)
    moved = _shaken(fresh["lora"], key)
    yield "no adapter is the base", _distance(forward(config, params, tokens, Bank()), plain), 0.0
    yield "gate 0 is the base", _distance(forward(config, params, tokens, moved, gates), plain), 0.0

    longer = np.pad(batch.tokens, ((0, 0), (0, 0), (0, 32)), constant_values=7)
    wide = dataclasses.replace(batch, tokens=longer)
    adapted = logps(config, params, moved, batch)
    yield "padding changes nothing", _distance(logps(config, params, moved, wide), adapted), tolerance
    copied = np.asarray(logps(config, params, moved, apart))[np.argsort(order)]
    yield "a shared prompt changes nothing", _distance(copied, np.asarray(adapted)[np.argsort(chosen)]), tolerance
    order = np.asarray([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda leaf: leaf[order], batch)
    yield "batch order changes nothing", _distance(logps(config, params, moved, shuffled), np.asarray(adapted)[order]), tolerance

    trainable, frozen = partition(params, moved, kinds=("lora",), base=False)
    referred = dataclasses.replace(batch, ref_logps=base)
    gradients = {n: jax.jit(make_gradient(config, Dpo(), n)) for n in (1, 2)}
    whole, _ = gradients[1](trainable, frozen, referred)
    yield "micro-batches change nothing", _distance(gradients[2](trainable, frozen, referred)[0], whole), tolerance
    yield from _mesh_laws(model, trainable, frozen, referred, gradients[1], whole, tolerance)

    pad = np.asarray([0, 3, 5, 1], np.int32)  # every row another length
    own, ahead = unstack(params), np.arange(4)[None]
    full = partial(jax.jit, static_argnums=0)(hidden_states)(config, params, tokens, moved)
    lengths = tokens.shape[1] - 4 - pad
    hidden, cache = jax.jit(prefill, static_argnums=(0, 4))(config, own, tokens[:, :-4], lengths, tokens.shape[1], moved)
    step, seen = jax.jit(decode_step, static_argnums=0), [hidden]
    for new in np.take_along_axis(tokens, lengths[:, None] + ahead, axis=1).T:
        hidden, cache = step(config, own, new, cache, moved)
        seen.append(hidden)
    head, places = jax.jit(logits), np.concatenate([lengths[:, None] - 1, lengths[:, None] + ahead], axis=1)
    cached, whole_forward = head(params, jnp.stack(seen, 1)), head(params, jnp.take_along_axis(full, places[:, :, None], axis=1))
    yield "cached decoding equals the full forward", _distance(cached, whole_forward), tolerance


def _mesh_laws(model: Model, trainable: Parts, frozen: Parts, batch: Batch, gradient: Any, whole: Any, tolerance: float):
    devices = jax.devices()[:4]
    shape = {1: (1, 1, 1), 2: (2, 1, 1), 3: (1, 1, 1)}.get(len(devices), (2, 2, 1))
    orders = list(itertools.permutations(devices))
    for order in dict.fromkeys((orders[0], orders[len(orders) // 2])):
        mesh = make_mesh(shape, list(order))
        with jax.set_mesh(mesh):
            sharded = Parts(jax.device_put(frozen.params, base_shardings(model.config, mesh)), frozen.adapters)
            placed = jax.device_put(trainable, replicated(mesh))
            grads, _ = gradient(placed, sharded, put_batch(batch, mesh))
        ids = ",".join(str(device.id) for device in order)
        yield f"mesh {shape} of devices {ids} changes nothing", _distance(grads, whole), tolerance


def _shaken(bank: Bank, key: jax.Array) -> Bank:
    """The bank with noise added: b = 0 would hide what a law looks for."""
    leaves, structure = jax.tree.flatten(bank)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [leaf + 0.02 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)])
