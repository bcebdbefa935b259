"""Supervised fine-tuning: the likelihood of the answers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.objectives.bounds import bounded
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


@dataclasses.dataclass(frozen=True)
class ConditionalSft:
    """Likelihood of labelled answers, each under the control of its own class, and what it is of each class.

    The mean over answer tokens, as in `Sft`. per_class: L = sum_k NLL_k / n_k over the classes k that the batch holds, each with its
    own n_k answer tokens: to the control of a class that is a run on its own class alone. `batch.classes` are 0 to `classes` - 1.

    What is pooled over the whole batch is each class's share of its tokens, which makes a token's weight known before its loss is.
    """

    per_class: bool = False
    classes: int = bounded(2, lambda value: value >= 2, ">= 2")
    form: ClassVar[Literal["labelled"]] = "labelled"
    needs_reference: ClassVar[bool] = False
    partners: ClassVar[bool] = False

    def _rows(self, batch: Batch) -> Float[Array, "B K"]:
        """The weight of each row in the column of its class; a row of a class that does not exist enters nothing."""
        return jax.nn.one_hot(batch.classes, self.classes, dtype=jnp.float32) * batch.weights[:, None]

    def pool(self, logps: Float[Array, "B 1"], batch: Batch) -> tuple[Float[Array, " K"], Float[Array, ""]]:
        """(answer tokens of each class, answer tokens of all)."""
        counts = jnp.sum(self._rows(batch) * (batch.ends - batch.starts).astype(jnp.float32), axis=0)
        return counts, jnp.sum(counts)

    def __call__(
        self, logps: Float[Array, "B 1"], batch: Batch, shares: Float[Array, " K"]
    ) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, answer tokens, summed metrics with their normalisers); `shares` of the whole batch's tokens, a class each."""
        sums = -jnp.sum(self._rows(batch) * logps, axis=0)
        counts, count = self.pool(logps, batch)
        names = ("bad", "good") if self.classes == 2 else tuple(map(str, range(self.classes)))
        metrics = {f"nll/{name}": (jax.lax.stop_gradient(sums[k]), counts[k]) for k, name in enumerate(names)}
        if not self.per_class:
            return jnp.sum(sums), count, metrics
        return jnp.sum(jnp.where(shares > 0, sums / jnp.maximum(shares, jnp.finfo(jnp.float32).tiny), 0.0)), count, metrics
