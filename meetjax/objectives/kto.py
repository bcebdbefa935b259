"""Losses on answers that are each judged good or bad, without pairs: KTO and unpaired APO-zero.

    D(y) = s(y) - s_ref(y)    log-ratio of the row's own answer, in nats
    L    = w_y sigmoid(-beta (D - z0))  for a good answer,  w_y sigmoid(beta (D - z0))  for a bad one;   mean over rows, not classes
    z0   = max(0, mean over rows of s(x, y') - s_ref(x, y'))  in KTO, where y' is an answer to another prompt;  0 in APO-zero

Two classes and not one with a switch: a training step pools only for an objective that has a method `pool`, and the data side
lays out partners y' only for one that says `partners`. KTO without its KL term *is* unpaired APO-zero.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from meetjax.objectives.bounds import not_negative, positive
from meetjax.types import Array, Batch

Outcome = tuple[Array, Array, dict[str, tuple[Array, Array]]]
"""(summed loss, normaliser, summed metrics with their normalisers)."""


def kto_loss(ratios: Float[Array, " B"], good: Bool[Array, " B"], z0: Float[Array, ""] | float, beta: float) -> Float[Array, " B"]:
    """1 - sigmoid(beta (D - z0)) of good answers, 1 - sigmoid(beta (z0 - D)) of bad ones.

    Ethayarajh et al. (2024), arXiv 2402.01306, eq. 7. With z0 = 0: D'Oosterlinck et al. (2024), arXiv 2408.06266, eq. 7 of one row.
    """
    return jax.nn.sigmoid(jnp.where(good, -beta, beta) * (ratios - z0))


@dataclasses.dataclass(frozen=True)
class _Judged:
    """What both losses share: hyperparameters, and all but where z0 comes from."""

    beta: float = positive(0.1)
    good_weight: float = not_negative(1.0)
    bad_weight: float = not_negative(1.0)
    form: ClassVar[Literal["labelled"]] = "labelled"
    needs_reference: ClassVar[bool] = True
    classes: ClassVar[int] = 2

    def _outcome(self, logps: Float[Array, "B C"], batch: Batch, z0: Array | float) -> Outcome:
        """The normaliser of the loss is the number of real rows, that of a metric the number of real rows of its class."""
        ratios, good = (logps - batch.ref_logps)[:, 0], batch.classes == 1
        losses = jnp.where(good, self.good_weight, self.bad_weight) * kto_loss(ratios, good, z0, self.beta)
        values = {"rewards": self.beta * ratios, "logps": logps[:, 0]}
        metrics = {}
        for side, own in (("good", good), ("bad", ~good)):
            weights = jnp.where(own, batch.weights, 0.0)
            for name, value in values.items():
                metrics[f"{name}/{side}"] = (jnp.sum(jax.lax.stop_gradient(value) * weights), jnp.sum(weights))
        return jnp.sum(losses * batch.weights), jnp.sum(batch.weights), metrics


@dataclasses.dataclass(frozen=True)
class Kto(_Judged):
    """Kahneman-Tversky optimisation.

    Answer 0 of a prompt is the row's own, of class 1 (good) or 0 (bad); answer 1 is that of another prompt and enters z0 alone,
    one number for the whole batch that has no gradient. Keep good_weight * good rows / (bad_weight * bad rows) in [1, 4/3].
    """

    partners: ClassVar[bool] = True

    def pool(self, logps: Float[Array, "B 2"], batch: Batch) -> tuple[Array, Array]:
        """(sum over real rows of s(x, y') - s_ref(x, y'), number of real rows)."""
        return jnp.sum((logps - batch.ref_logps)[:, 1] * batch.weights), jnp.sum(batch.weights)

    def __call__(self, logps: Float[Array, "B 2"], batch: Batch, pooled: Float[Array, ""]) -> Outcome:
        """`pooled` is the mean over the whole batch of what `pool` sums; `kl` among the metrics is z0."""
        z0 = jax.lax.stop_gradient(jnp.maximum(pooled, 0.0))
        total, count, metrics = self._outcome(logps, batch, z0)
        return total, count, metrics | {"kl": (z0 * count, count)}


@dataclasses.dataclass(frozen=True)
class ApoZeroUnpaired(_Judged):
    """Anchored preference optimisation of single rows, or KTO without its KL term: what is gained is measured from the reference."""

    partners: ClassVar[bool] = False

    def __call__(self, logps: Float[Array, "B 1"], batch: Batch) -> Outcome:
        return self._outcome(logps, batch, 0.0)
