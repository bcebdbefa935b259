"""Supervised fine-tuning: the likelihood of the answers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Float

from meetjax.types import Array, Batch


def sft_loss(logps: Float[Array, "B 1"], tokens: Float[Array, "B 1"], weights: Float[Array, " B"]) -> tuple[Array, Array]:
    """(sum, normaliser) of L = - sum_{b,t} m_bt log pi(y_bt) / sum_{b,t} m_bt: the token count is global, not per micro-batch."""
    return -jnp.sum(logps * weights[:, None]), jnp.sum(tokens * weights[:, None])


@dataclasses.dataclass(frozen=True)
class Sft:
    """Answer-only likelihood of demonstrations, or of the chosen answers of pairs."""

    form: ClassVar[Literal["completion"]] = "completion"
    needs_reference: ClassVar[bool] = False

    def __call__(self, logps: Float[Array, "B 1"], batch: Batch) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, normaliser, summed metrics with their normaliser)."""
        tokens = (batch.ends - batch.starts).astype(jnp.float32)
        total, count = sft_loss(logps, tokens, batch.weights)
        return total, count, {"logps/chosen": (jnp.sum(logps[:, 0] * batch.weights), jnp.sum(batch.weights))}
