"""Representation alignment (RAHF): tell good from bad by instruction, then move the hidden states along the difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.objectives.bounds import bounded, not_negative
from meetjax.objectives.preference import preferred
from meetjax.types import Array, Batch, Instruction

States = list[Float[Array, "B K T D"]]
"""Hidden states of a batch's rows at each tapped block."""


def contrastive_instruction_loss(
    own: Float[Array, " B"], other: Float[Array, " B"], tokens: Float[Array, " B"], epsilon: float, mean: bool = True
) -> Float[Array, " B"]:
    """L = -s(y | p+, q) / n - (1 - e) log sigmoid(a - b) - e log sigmoid(b - a), a and b the scores under p+ and p-.

    Liu et al. (2023), arXiv 2312.15997, step 1 of SCIT, with the smoothed contrast of Zhang et al. (2023), arXiv 2302.05206:
    log(A / (A + B)) with A = e^a is log sigmoid(a - b). own, other: summed answer log-probabilities in nats under the instruction
    of the answer's class and under the other one. mean: a and b a token, else summed. The released code contrasts unshifted
    labels and averages over padding; this is the formula.
    """
    gap = (own - other) / tokens if mean else own - other
    return -own / tokens - (1 - epsilon) * jax.nn.log_sigmoid(gap) - epsilon * jax.nn.log_sigmoid(-gap)


@dataclasses.dataclass(frozen=True)
class Scit:
    """Contrastive instruction tuning: each answer under its own class's instruction and under the other one."""

    epsilon: float = bounded(0.2, lambda value: 0 <= value < 1, "at least 0 and less than 1")
    mean: bool = True
    form: ClassVar[str] = "labelled"
    asks: ClassVar[tuple[str, ...]] = ("own", "other")
    needs_reference: ClassVar[bool] = False
    partners: ClassVar[bool] = False

    def __call__(self, logps: Float[Array, "B 2"], batch: Batch) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, normaliser, summed metrics with their normaliser)."""
        weights, count = batch.weights, jnp.sum(batch.weights)
        tokens = (batch.ends - batch.starts).astype(jnp.float32)[:, 0]
        losses = contrastive_instruction_loss(logps[:, 0], logps[:, 1], tokens, self.epsilon, self.mean)
        values = {"logps/own": logps[:, 0], "logps/other": logps[:, 1], "instruction/accuracies": preferred(logps[:, 0] - logps[:, 1])}
        metrics = {name: (jnp.sum(jax.lax.stop_gradient(value) * weights), count) for name, value in values.items()}
        return jnp.sum(losses * weights), count, metrics


def length(residual: Float[Array, "... D"]) -> Float[Array, "..."]:
    """||r||_2 whose gradient at r = 0 is 0 and not NaN."""
    square = jnp.sum(residual * residual, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def representation_loss(
    found: Float[Array, "S B T D"], target: Float[Array, "S B T D"], mask: Float[Array, "B T"], loss: Literal["l2norm", "mse"]
) -> tuple[Array, Array]:
    """(sum, normaliser) of L = 1/|S| sum_l sum_bt M_bt ||h^l - target^l||_2 / sum_bt M_bt (Liu et al. 2023, arXiv 2312.15997, step 2).

    "mse" squares the norm, as the paper's formula has it; the released code does not. Padding is not in the denominator.
    """
    residual = (found - target).astype(jnp.float32)
    distance = length(residual) if loss == "l2norm" else jnp.sum(residual * residual, axis=-1)
    return jnp.sum(jnp.mean(distance, axis=0) * mask), jnp.sum(mask)


@dataclasses.dataclass(frozen=True)
class Rahf:
    """Fits the hidden states of the plain prompt to h + alpha (h_good - h_bad), all three of a frozen teacher.

    taps: blocks behind which states are matched; asks: the prompts of an answer, the plain one first; looks: how the teacher sees
    h, h_good and h_bad, each as (which of the prompts, gates of the teacher's bank). The defaults are SCIT, one model under two
    instructions. Dual, two models under one prompt, is asks=("plain",) and looks that differ in their gates.
    """

    taps: tuple[int, ...] = (10, 12, 14, 16, 18)
    alpha: float = not_negative(5.0)
    loss: Literal["l2norm", "mse"] = "l2norm"
    asks: tuple[Instruction, ...] = ("plain", "good", "bad")
    looks: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (1, ()), (2, ()))
    form: ClassVar[str] = "labelled"
    needs_reference: ClassVar[bool] = False
    partners: ClassVar[bool] = False
    reads_states: ClassVar[bool] = True

    def __call__(self, student: Callable, teacher: Callable, batch: Batch) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, normaliser, summed metrics) from states [S, B, T, D] behind the taps.

        student(prompt, taps) and teacher(prompt, gates, taps) run the rows of one of the batch's prompts.
        """
        width = batch.tokens.shape[2]
        counts = (batch.ends - batch.starts)[:, 0]
        place = jnp.arange(width, dtype=jnp.int32)[None]
        mask = (place < counts[:, None]).astype(jnp.float32) * batch.weights[:, None]

        def answers(states: Array, row: int) -> Float[Array, "S B T D"]:
            """The states at the tokens that the answer consists of, which stand elsewhere behind every prompt."""
            places = jnp.minimum(batch.starts[:, row, None] + place, width - 1)
            return jnp.take_along_axis(states, places[None, :, :, None], axis=2)

        seen = {look: answers(teacher(*look, self.taps), look[0]) for look in dict.fromkeys(self.looks)}
        base, good, bad = (seen[look] for look in self.looks)
        direction = good.astype(jnp.float32) - bad.astype(jnp.float32)
        target = jax.lax.stop_gradient(base.astype(jnp.float32) + self.alpha * direction)
        found = answers(student(0, self.taps), 0).astype(jnp.float32)
        total, count = representation_loss(found, target, mask, self.loss)
        moved = jnp.sum(jnp.mean(length(jax.lax.stop_gradient(direction)), axis=0) * mask)
        return total, count, {"direction": (moved, count)}
