"""FIGA: imitate what a revision put in, and unlearn what it took out, token by token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.objectives.bounds import not_negative
from meetjax.types import Array, Batch


def figa_loss(
    scores: Float[Array, "B T"], weights: Float[Array, "B T"], bad_weight: float, threshold: float
) -> tuple[Array, Array, Float[Array, "B T"]]:
    """(sum, tokens that count, which) of L = sum_t w_t CE_t / |{t: w_t != 0}|; w is 1 on new tokens, -bad_weight on dropped ones.

    A dropped token counts only while CE_t <= threshold, nats, a comparison without a gradient: that bounds the loss from below by
    -bad_weight * threshold, for the model unlearns only what it would still say. Guo et al. (2023), arXiv 2311.04072, as released.
    """
    losses = -scores
    kept = (weights > 0) | ((weights < 0) & (jax.lax.stop_gradient(losses) <= threshold))
    signed = jnp.where(weights > 0, 1.0, -bad_weight) * losses
    return jnp.sum(jnp.where(kept, signed, 0.0)), jnp.sum(kept.astype(jnp.float32)), kept.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Figa:
    """Fine-grained quality signals from edits; both answers of a row, the revised and the original one, enter one sum."""

    bad_weight: float = not_negative(0.5)
    threshold: float = not_negative(0.6)
    form: ClassVar[str] = "edited"
    needs_reference: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def __call__(self, scores: Float[Array, "BK T"], batch: Batch) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, tokens that count, summed metrics with their normalisers) from log-probabilities of each answer token."""
        per_prompt = batch.tokens.shape[1]
        assert batch.token_weights is not None, "rows of edited answers have token weights"
        weights = batch.token_weights.reshape(scores.shape) * jnp.repeat(batch.weights, per_prompt)[:, None]
        total, count, kept = figa_loss(scores, weights, self.bad_weight, self.threshold)
        metrics = {}
        for name, side in (("new", weights > 0), ("dropped", weights < 0)):
            own = side.astype(jnp.float32)
            metrics[f"nll/{name}"] = (jnp.sum(jax.lax.stop_gradient(-scores) * own), jnp.sum(own))
            metrics[f"kept/{name}"] = (jnp.sum(kept * own), jnp.sum(own))
        return total, count, metrics
