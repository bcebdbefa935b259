"""The training loop of one stage, in the order of time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from meetjax.adapters.bank import KIND_OF
from meetjax.adapters.tree import Bank, count_parameters
from meetjax.data.loader import Buckets, Plan, loader, pad_batch
from meetjax.data.tokenize import Rows
from meetjax.errors import MeetjaxError
from meetjax.models.attention import choose_attention
from meetjax.models.config import ModelConfig
from meetjax.train import hosts
from meetjax.train.checkpoint import Checkpoints
from meetjax.train.memory import choose_remat, compile_step
from meetjax.train.metrics import MetricsLog
from meetjax.train.optim import make_optimizer
from meetjax.train.reference import Reference
from meetjax.train.sharding import check_batch, put_batch, state_shardings
from meetjax.train.stage import Stage, Train
from meetjax.train.step import Parts, init_state, join, make_step, partition
from meetjax.types import Batch, Params


class Interrupted(Exception):
    """SIGTERM came: the state of `step` is saved in `folder`, and the same command continues there."""

    def __init__(self, step: int, folder: Path):
        super().__init__(f"stopped by SIGTERM after step {step}, saved in {folder}; run the same command to go on")


def fit(
    config: ModelConfig,
    params: Params,
    bank: Bank,
    rows: Rows,
    stage: Stage,
    train: Train,
    folder: Path,
    *,
    buckets: Buckets,
    mesh: jax.sharding.Mesh,
    identity: dict[str, Any],
    reference: Reference | None = None,
    teacher: Bank | None = None,
    remat: str = "auto",
    attention: str = "auto",
    title: str = "train",
    console: Console | None = None,
) -> tuple[Params, Bank]:
    """Trains what `stage` names on `rows` and returns (params, bank); everything lands under `folder`.

    Continues from the newest checkpoint there, bit for bit. A batch is `train.batch_size` prompts. identity: what a checkpoint
    must agree with to be resumed; teacher: the frozen bank of an objective that asks one; remat: as in `choose_remat`; attention: as in
    `choose_attention` (references, which are scored once, are xla's). Raises MeetjaxError when the loss is not finite (naming the last
    good checkpoint), when nothing trains, when a checkpoint is of another run; Interrupted after SIGTERM, which
    one of several hosts passes on to all.
    """
    base = "base" in stage.trains
    named = tuple(KIND_OF[type(spec)] for spec in stage.trains if spec != "base")
    trainable, frozen = partition(params, bank, kinds=named, base=base)
    frozen = dataclasses.replace(frozen, teacher=teacher)
    # The step reuses the buffers of its state: what trains is a copy, and what is passed in stays valid.
    trainable = jax.tree.map(jnp.copy, jax.device_put(trainable, state_shardings(config, trainable, mesh)))
    tx = make_optimizer(stage.optim, train.steps)
    check_batch(train.batch_size, mesh, train.microbatches)
    soft = 0 if bank.prompt is None else math.prod(bank.prompt.vectors.shape[:2])
    attention, attended = choose_attention(config, attention, mesh.devices.flat[0].platform, buckets[-1] + soft)

    def make(policy: str):
        return make_step(dataclasses.replace(config, remat=policy, attention=attention), stage, tx, train.microbatches)

    if stage.objective.needs_reference and reference is None:
        reference = Reference(config, params)
    share = hosts.share_of(mesh)
    batches = loader(rows, train.batch_size, buckets, train.seed, *share)
    # JAX's own handler of SIGTERM brings all hosts to the same step, so with several it must stay in place.
    console = console or Console()
    alone, stop, stopping = jax.process_count() == 1, threading.Event(), False
    # Leaving the block waits for the last write, so that what is said to be saved is, whatever ends the loop.
    with (
        _sigterm_sets(stop) if alone else contextlib.nullcontext(),
        contextlib.closing(Checkpoints(folder / "checkpoints", identity)) as checkpoints,
        jax.set_mesh(mesh),
    ):
        # Donated: the state takes the copy over, and no second one stays behind.
        places = state_shardings(config, jax.eval_shape(lambda trainable: init_state(trainable, tx), trainable), mesh)
        state = jax.jit(init_state, static_argnums=1, donate_argnums=0, out_shardings=places)(trainable, tx)
        if (found := checkpoints.restore(state, console.print)) is not None:
            state, position = found
            batches.set_state(position)
        begin, saved = int(state.step), int(state.step)
        unit = "pairs" if stage.objective.form == "pair" else "examples"
        log = MetricsLog(folder, train.steps, begin, unit, title, console, writes=hosts.writes())
        with log:
            log.console.print(f"{title}: {count_parameters(trainable):,} parameters train, steps {begin} to {train.steps}")
            largest = put_batch(_largest(rows, train.batch_size, buckets, stage, share), mesh)
            step, why = choose_remat(remat, make, (state, frozen, largest), mesh.local_devices[0])
            log.console.print(f"{title}: {attended}; {why}")
            seen, pending = {buckets[-1]}, None
            for number in range(begin + 1, train.steps + 1):
                batch, chosen = next(batches)
                if reference is not None and stage.objective.needs_reference:
                    batch = reference.attach(batch, rows, chosen, mesh)
                batch = put_batch(batch, mesh)
                timed = (width := batch.tokens.shape[-1]) in seen
                if not timed:
                    seen.add(width)
                    log.console.print(f"{title}: compiled for {width} tokens in {compile_step(step, state, frozen, batch).seconds:.1f} s")
                state, metrics = step(state, frozen, batch)
                if pending is not None:  # one step late, so that the device never waits for the host
                    _write(log, *pending, checkpoints)
                pending = (number, metrics, float(batch.weights.sum()), _tokens(batch), timed)
                stopping = (
                    stop.is_set() if alone else hosts.preempted()
                )  # read once, so that the loop does not end on a step that is not saved
                saves = number % train.save_every == 0 or number == train.steps or stopping
                if saves or number == begin + 1:  # nothing that is not finite is ever saved, and the first step is told at once
                    _write(log, *pending, checkpoints)
                    pending = None
                if saves:
                    checkpoints.save(state, batches.get_state())
                    saved = number
                if stopping:
                    break
    if stopping or stop.is_set():
        raise Interrupted(saved, folder)
    params, bank = join(state.trainable, Parts(frozen.params, frozen.adapters))
    return params, bank if alone else hosts.whole(bank, mesh)


def _largest(rows: Rows, batch_size: int, buckets: Buckets, stage: Stage, share: tuple[int, int]) -> Batch:
    """A batch of the longest bucket's shape, for compiling; its content means nothing."""
    batch, _ = pad_batch(rows, Plan(buckets[-1], np.arange(batch_size) % len(rows), batch_size), *share)
    if stage.objective.needs_reference:
        batch = dataclasses.replace(batch, ref_logps=np.zeros(batch.starts.shape, np.float32))
    return batch


def _tokens(batch: Batch) -> int:
    """Tokens of the batch's rows without their padding."""
    return int(batch.ends.reshape(*batch.tokens.shape[:2], -1)[:, :, -1].sum())


def _write(log: MetricsLog, number: int, metrics: Any, examples: float, tokens: int, timed: bool, checkpoints: Checkpoints) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.write(number, values, examples=examples, tokens=tokens, timed=timed)
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        newest = checkpoints.newest
        raise MeetjaxError(
            f"{log.folder}: {bad[0]} at step {number}",
            expected="a finite number",
            found=values[bad[0]],
            fix=f"last good checkpoint: {'none' if newest is None else f'step {newest} in {checkpoints.folder}'}; lower the learning rate",
        )


@contextlib.contextmanager
def _sigterm_sets(stop: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers belong to the main thread; a caller in another one handles its own signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
