"""Losses on pairs of answers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.types import Array, Batch


def dpo_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float) -> tuple[Float[Array, " B"], Float[Array, "B 2"]]:
    """L = -log sigmoid(r_w - r_l) with rewards r = beta (s - s_ref): (loss [B], rewards [B, 2]).

    Rafailov et al. (2023), arXiv 2305.18290, eq. 7.
    logps, ref_logps: summed answer log-probabilities in nats, chosen first.
    """
    rewards = beta * (logps - ref_logps)
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]), rewards


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation; the reference is the same model without adapters."""

    beta: float = 0.1
    form: ClassVar[Literal["pair"]] = "pair"
    needs_reference: ClassVar[bool] = True

    def __call__(self, logps: Float[Array, "B 2"], batch: Batch) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, normaliser, summed metrics with their normaliser); the normaliser is the number of real pairs."""
        losses, rewards = dpo_loss(logps, batch.ref_logps, self.beta)
        weights, count = batch.weights, jnp.sum(batch.weights)
        margins = rewards[:, 0] - rewards[:, 1]
        values = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": preferred(margins),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
        metrics = {name: (jnp.sum(jax.lax.stop_gradient(value) * weights), count) for name, value in values.items()}
        return jnp.sum(losses * weights), count, metrics


def preferred(margins: Float[Array, " B"]) -> Float[Array, " B"]:
    """1 where the chosen answer wins, 0 where it loses, 1/2 for a tie (an untrained adapter ties everywhere)."""
    return (margins > 0).astype(jnp.float32) + 0.5 * (margins == 0).astype(jnp.float32)
