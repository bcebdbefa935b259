"""The training step: differentiate the trainable argument only, update it, and nothing else exists.

The base is the second argument of the loss. It has no gradient, no optimiser state and no mask, because none is ever asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from meetjax.adapters.tree import KINDS, Bank
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import block_states
from meetjax.models.quant import is_quantized
from meetjax.objectives.logps import answer_logps, answer_token_logps
from meetjax.objectives.reward import answer_rewards
from meetjax.train.optim import learning_rate
from meetjax.train.sharding import keep_placed
from meetjax.train.stage import Stage
from meetjax.types import Array, Batch, Params

PART = 1280
"""Tokens of a micro-batch at most, where the rule decides."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """One side of the partition: base parameters and adapters, None where the other side has them.

    teacher: a bank of its own for objectives that match a teacher's hidden states (never trained).
    """

    params: Params | None = None
    adapters: Bank | None = None
    teacher: Bank | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes and a checkpoint holds."""

    trainable: Any
    opt_state: Any
    step: Int[Array, ""]


def partition(params: Params, adapters: Bank | None, *, kinds: tuple[str, ...], base: bool) -> tuple[Parts, Parts]:
    """(trainable, frozen): the named adapter kinds, and the base when `base`, against all the rest.

    Raises MeetjaxError when nothing would train, and for a quantised base that should.
    """
    if base and any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise MeetjaxError(
            "partition: base", expected="whole weights, to train them", found="quantised ones", fix="load it with quantize none"
        )
    adapters = adapters or Bank()
    chosen = Bank(**{kind: getattr(adapters, kind) for kind in kinds})
    rest = Bank(**{kind: getattr(adapters, kind) for kind in KINDS if kind not in kinds})
    trainable, frozen = Parts(params if base else None, chosen), Parts(None if base else params, rest)
    if not jax.tree.leaves(trainable):
        raise MeetjaxError("partition: zero trainable leaves", expected="base or a kind that the bank holds", found=kinds or "none")
    return trainable, frozen


def join(trainable: Parts, frozen: Parts) -> tuple[Params, Bank]:
    """The inverse of `partition`."""
    adapters = Bank(**{kind: getattr(trainable.adapters, kind) or getattr(frozen.adapters, kind) for kind in KINDS})
    params = frozen.params if trainable.params is None else trainable.params
    assert params is not None, "one side of a partition has the base"
    return params, adapters


def init_state(trainable: Any, tx: optax.GradientTransformation) -> State:
    """Step 0: the optimiser has the structure of what trains and of nothing else."""
    return State(trainable, tx.init(trainable), jnp.zeros((), jnp.int32))


def make_loss(config: ModelConfig, objective: Any) -> Callable[..., tuple[Array, tuple[Array, dict]]]:
    """loss(trainable, frozen, batch, pooled=None) -> (summed loss, (normaliser, summed metrics)); pooled None: the batch is whole."""

    def loss(trainable: Parts, frozen: Parts, batch: Batch, pooled: Array | None = None) -> tuple[Array, tuple[Array, dict]]:
        params, adapters = join(trainable, frozen)
        if getattr(objective, "reads_states", False):
            total, count, metrics = objective(*_lookers(config, params, adapters, frozen, batch), batch)
            return total, (count, metrics)
        if getattr(objective, "reads_tokens", False):
            scores, _ = answer_token_logps(config, params, adapters, batch)
            total, count, metrics = objective(scores, batch)
            return total, (count, metrics)
        if getattr(objective, "reads_rewards", False):
            total, count, metrics = objective(answer_rewards(config, params, adapters, batch), batch)
            return total, (count, metrics)
        logps = answer_logps(config, params, adapters, batch)
        if hasattr(objective, "pool"):
            total, count, metrics = objective(logps, batch, _mean(*objective.pool(logps, batch)) if pooled is None else pooled)
        else:
            total, count, metrics = objective(logps, batch)
        return total, (count, metrics)

    return loss


def _lookers(config: ModelConfig, params: Params, adapters: Bank, frozen: Parts, batch: Batch) -> tuple[Callable, Callable]:
    """(student, teacher) for `Rahf`: states of the rows of one prompt, under all adapters or under the teacher's bank."""

    def states(prompt: int, taps: tuple[int, ...], bank: Bank | None, gates: Array | None) -> Array:
        return jnp.stack(block_states(config, params, batch.tokens[:, prompt], taps, bank, gates))

    def student(prompt: int, taps: tuple[int, ...]) -> Array:
        return states(prompt, taps, adapters, batch.gates)

    def teacher(prompt: int, gates: tuple[float, ...], taps: tuple[int, ...]) -> Array:
        rows = jnp.tile(jnp.asarray(gates, jnp.float32), (batch.tokens.shape[0], 1)) if gates else None
        return jax.lax.stop_gradient(states(prompt, taps, frozen.teacher if gates else frozen.adapters, rows))

    return student, teacher


def _mean(total: Array, weight: Array) -> Array:
    return jax.lax.stop_gradient(total / jnp.maximum(weight, 1.0))


def _pool(config: ModelConfig, objective: Any, trainable: Parts, frozen: Parts, parts: Batch) -> Array:
    """What `objective` pools over all micro-batches: one forward pass of each before any gradient."""

    def one(part: Batch) -> tuple[Array, Array]:
        return objective.pool(answer_logps(config, *join(trainable, frozen), part), part)

    total, weight = jax.lax.map(one, parts)
    return _mean(jnp.sum(total, axis=0), jnp.sum(weight, axis=0))


def choose_microbatches(objective: Any, rows: int, tokens: int) -> int:
    """Into how many parts a batch of `rows` goes, of `tokens` each: on CPU as few as keep a part within `PART` tokens, else one.

    A layer's states then stay in the caches: of 8 pairs of 592 tokens a float32 step took 13.8 s and 1.6 GB in 4 parts, 15.3 s and 4.2 GB
    whole. An objective that pools over its batch would pay for parts with a forward pass.
    """
    spread = any(size > 1 for size in jax.sharding.get_abstract_mesh().shape.values())
    if jax.default_backend() != "cpu" or spread or hasattr(objective, "pool"):
        return 1
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and (rows // parts * tokens <= PART or parts == rows))


def make_gradient(config: ModelConfig, objective: Any, microbatches: int = 0) -> Callable[[Parts, Parts, Batch], tuple[Parts, dict]]:
    """gradient(trainable, frozen, batch) -> (gradient, metrics), the same for every split into micro-batches (0: a split by rule).

    Sums are accumulated and divided once by the batch's own normaliser (tokens or pairs), so short micro-batches weigh less.
    """
    value_and_grad = jax.value_and_grad(make_loss(config, objective), has_aux=True)

    def gradient(trainable: Parts, frozen: Parts, batch: Batch) -> tuple[Parts, dict]:
        pooled, tokens = None, batch.tokens
        split = microbatches or choose_microbatches(objective, tokens.shape[0], tokens[0].size)

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            (total, (count, metrics)), grads = value_and_grad(trainable, frozen, part, pooled)
            return jax.tree.map(jnp.add, carry, (total, count, metrics, grads)), None

        if split == 1:
            (total, (count, metrics)), grads = value_and_grad(trainable, frozen, batch)
        else:
            parts = jax.tree.map(lambda leaf: leaf.reshape(split, -1, *leaf.shape[1:]), batch)
            if hasattr(objective, "pool"):
                pooled = _pool(config, objective, trainable, frozen, parts)
            first = jax.tree.map(lambda leaf: leaf[0], parts)
            shapes = jax.eval_shape(value_and_grad, trainable, frozen, first, pooled)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (total, (count, metrics)), grads = zeros
            (total, count, metrics, grads), _ = jax.lax.scan(add, (total, count, metrics, grads), parts)
        count = jnp.maximum(count, 1.0)
        means = {name: value / jnp.maximum(weight, 1.0) for name, (value, weight) in metrics.items()}
        return jax.tree.map(lambda leaf: leaf / count, grads), {"loss": total / count} | means

    return gradient


def make_step(config: ModelConfig, stage: Stage, tx: optax.GradientTransformation, microbatches: int = 0) -> Callable:
    """The jitted step(state, frozen, batch) -> (state, metrics); the old state's buffers are reused."""
    gradient = make_gradient(config, stage.objective, microbatches)

    def step(state: State, frozen: Parts, batch: Batch) -> tuple[State, dict[str, Array]]:
        grads: Any
        grads, metrics = gradient(state.trainable, frozen, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": learning_rate(opt_state)}
        return keep_placed(config, State(optax.apply_updates(state.trainable, updates), opt_state, state.step + 1)), metrics

    return jax.jit(step, donate_argnums=0)
