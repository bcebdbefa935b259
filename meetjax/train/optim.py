"""The optimiser of a stage: clip, then AdamW under a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meetjax.adapters.tree import Bank, columns, entry_axis, kinds
from meetjax.train.stage import Optim
from meetjax.types import Array


def make_optimizer(optim: Optim, steps: int) -> optax.GradientTransformation:
    """Clips the gradient of each gate column, and of the base, by its own norm; then AdamW under the schedule.

    Adapters of different columns are different models that happen to train side by side (MEET's controls): with a norm each, a
    mixed run is the same as one run a class.
    """
    warmup = round(optim.warmup * steps)
    rate, rest = optim.learning_rate, max(steps - warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "constant": lambda: optax.constant_schedule(rate),
    }[optim.schedule]()
    # The warm-up ends at the peak and starts above zero: a step of rate 0 would be wasted.
    schedule = optax.join_schedules([lambda count: rate * (count + 1) / (warmup + 1), after], [warmup])
    adamw = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "weight_decay"))(
        learning_rate=schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay
    )
    tx = optax.chain(
        clip_by_column_norm(optim.clip) if optim.clip else optax.identity(),
        adamw,
        # An update of AdamW, decay included, is proportional to its rate.
        scale_base(optim.base_learning_rate / rate) if optim.base_learning_rate else optax.identity(),
    )
    return optax.GradientTransformation(_promoting(tx.init), _promoting(tx.update))


def clip_by_column_norm(limit: float) -> optax.GradientTransformation:
    """Scales the gradient of each gate column, all kinds together, to a norm of at most `limit`, and that of anything else likewise."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        others = [leaf for leaf in jax.tree.leaves(updates, is_leaf=_is_bank) if not _is_bank(leaf)]
        factor = _factor(optax.tree.norm(others), limit) if others else 1.0
        clipped = jax.tree.map(lambda node: _clip_bank(node, limit) if _is_bank(node) else node * factor, updates, is_leaf=_is_bank)
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_base(factor: float) -> optax.GradientTransformation:
    """Multiplies the update of everything but adapters."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda node: node if _is_bank(node) else node * factor, updates, is_leaf=_is_bank), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate(opt_state: Any) -> Array:
    """The rate of the step that led to this state of `make_optimizer`'s optimiser."""
    return opt_state[1].hyperparams["learning_rate"]


def _is_bank(node: Any) -> bool:
    return isinstance(node, Bank)


def _factor(norm: Array, limit: float) -> Array:
    return jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))


def _clip_bank(bank: Bank, limit: float) -> Bank:
    squares = jnp.zeros(columns(bank), jnp.float32)
    for kind in kinds(bank):
        tree = getattr(bank, kind)
        axis = entry_axis(kind)
        for leaf in jax.tree.leaves(tree):
            own = jnp.sum(jnp.square(leaf), axis=[i for i in range(leaf.ndim) if i != axis])
            squares = squares.at[jnp.asarray(tree.entries)].add(own)
    factors = _factor(jnp.sqrt(squares), limit)

    def scaled(kind: str, leaf: Array) -> Array:
        own = factors[jnp.asarray(getattr(bank, kind).entries)]
        return leaf * jnp.expand_dims(own, [i for i in range(leaf.ndim) if i != entry_axis(kind)])

    return Bank(**{kind: jax.tree.map(lambda leaf, kind=kind: scaled(kind, leaf), getattr(bank, kind)) for kind in kinds(bank)})


def _promoting(function: Callable) -> Callable:
    """Optax mixes counts and rates; it must run also where a program asks for the strict promotion that this library keeps to."""

    def run(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return run
