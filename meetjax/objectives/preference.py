"""Losses on pairs of answers that compare the model with a reference: the DPO family.

    D(y) = s(y) - s_ref(y)    log-ratio of an answer, in nats; s sums over its tokens, EOS included
    r(y) = beta D(y)          its reward, which every loss here logs alike
    z    = r(y_w) - r(y_l)    the margin of the chosen answer over the rejected one

A loss is a pure function of summed log-probabilities [B, 2], chosen first, that returns (loss [B], rewards [B, 2]), and a frozen
dataclass of its hyperparameters that calls it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.objectives.bounds import flip_rate, positive
from meetjax.types import Array, Batch

Scores = tuple[Float[Array, " B"], Float[Array, "B 2"]]
"""(loss [B], rewards [B, 2]) of B pairs."""


class PairLoss:
    """What every loss on pairs is; a subclass is a frozen dataclass of hyperparameters with a method `scores`.

    One with `reads_rewards` is given the rewards of a reward head in place of log-probabilities.
    """

    form: ClassVar[Literal["pair"]] = "pair"
    needs_reference: ClassVar[bool] = True
    reads_rewards: ClassVar[bool] = False

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        """(loss [B], rewards [B, 2]) of every pair, filled-up ones too."""
        raise NotImplementedError

    def __call__(self, logps: Float[Array, "B 2"], batch: Batch) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """(summed loss, normaliser, summed metrics with their normaliser); the normaliser is the number of real pairs."""
        losses, rewards = self.scores(logps, batch)
        weights, count = batch.weights, jnp.sum(batch.weights)
        margins = _margins(rewards)
        values = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": preferred(margins),
        }
        if not self.reads_rewards:
            values |= {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
        metrics = {name: (jnp.sum(jax.lax.stop_gradient(value) * weights), count) for name, value in values.items()}
        return jnp.sum(losses * weights), count, metrics


def preferred(margins: Float[Array, " B"]) -> Float[Array, " B"]:
    """1 where the chosen answer wins, 0 where it loses, 1/2 for a tie (an untrained adapter ties everywhere)."""
    return (margins > 0).astype(jnp.float32) + 0.5 * (margins == 0).astype(jnp.float32)


def answer_tokens(batch: Batch) -> Float[Array, "B C"]:
    """n(y): tokens of each answer, EOS included, from its places and not from its values; 1 for an empty one, to divide by."""
    return jnp.maximum(batch.ends - batch.starts, 1).astype(jnp.float32)


def _margins(rewards: Float[Array, "B 2"]) -> Float[Array, " B"]:
    return rewards[:, 0] - rewards[:, 1]


def dpo_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float) -> Scores:
    """L = -log sigmoid(z).

    Rafailov et al. (2023), arXiv 2305.18290, eq. 7.
    """
    rewards = beta * (logps - ref_logps)
    return -jax.nn.log_sigmoid(_margins(rewards)), rewards


@dataclasses.dataclass(frozen=True)
class Dpo(PairLoss):
    """Direct preference optimisation; the reference is the same model without adapters."""

    beta: float = positive(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return dpo_loss(logps, batch.ref_logps, self.beta)


def cdpo_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float, epsilon: float) -> Scores:
    """L = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z), least at z = ln((1 - eps) / eps).

    Mitchell (2023), "A note on DPO with noisy preferences and relationship to IPO".
    """
    rewards = beta * (logps - ref_logps)
    z = _margins(rewards)
    return -(1 - epsilon) * jax.nn.log_sigmoid(z) - epsilon * jax.nn.log_sigmoid(-z), rewards


@dataclasses.dataclass(frozen=True)
class Cdpo(PairLoss):
    """Conservative DPO: labels smoothed by the rate `epsilon` of swapped pairs, so that margins stay finite."""

    beta: float = positive(0.1)
    epsilon: float = flip_rate(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return cdpo_loss(logps, batch.ref_logps, self.beta, self.epsilon)


def robust_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float, epsilon: float) -> Scores:
    """L = (-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)) / (1 - 2 eps): over swaps of rate eps its mean is the DPO loss.

    Unbounded below: its slope in z tends to -eps / (1 - 2 eps), so the loss turns negative and margins grow without end.
    Chowdhury, Kini and Natarajan (2024), arXiv 2403.00409.
    """
    rewards = beta * (logps - ref_logps)
    z = _margins(rewards)
    return (-(1 - epsilon) * jax.nn.log_sigmoid(z) + epsilon * jax.nn.log_sigmoid(-z)) / (1 - 2 * epsilon), rewards


@dataclasses.dataclass(frozen=True)
class RobustDpo(PairLoss):
    """DPO made unbiased for a rate `epsilon` of swapped pairs; stop early, it has no minimum."""

    beta: float = positive(0.1)
    epsilon: float = flip_rate(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return robust_loss(logps, batch.ref_logps, self.beta, self.epsilon)


def dpo_norm_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], tokens: Float[Array, "B 2"], beta: float) -> Scores:
    """L = -log sigmoid(beta (D_w / n_w - D_l / n_l)); the rewards are those of DPO, not divided by n, as trl logs them.

    Lambert et al. (2024), Tulu 3, arXiv 2411.15124.
    """
    rewards = beta * (logps - ref_logps)
    return -jax.nn.log_sigmoid(_margins(rewards / tokens)), rewards


@dataclasses.dataclass(frozen=True)
class NormalizedDpo(PairLoss):
    """DPO per token, so that long answers do not dominate; beta is larger than in DPO by about the length of an answer."""

    beta: float = positive(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return dpo_norm_loss(logps, batch.ref_logps, answer_tokens(batch), self.beta)


def ipo_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], tokens: Float[Array, "B 2"] | None, tau: float) -> Scores:
    """L = (D_w / n_w - D_l / n_l - 1 / (2 tau))^2, without the n when `tokens` is None; rewards tau D.

    Azar et al. (2023), arXiv 2310.12036, eq. 17, which has no n: its authors confirmed the division to the makers of trl.
    """
    ratios = logps - ref_logps
    gaps = _margins(ratios if tokens is None else ratios / tokens)
    return jnp.square(gaps - 1 / (2 * tau)), tau * ratios


@dataclasses.dataclass(frozen=True)
class Ipo(PairLoss):
    """Identity preference optimisation: a wanted gap of 1 / (2 tau) in place of one without end; a small tau is a large gap."""

    tau: float = positive(0.1)
    length_normalize: bool = True

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return ipo_loss(logps, batch.ref_logps, answer_tokens(batch) if self.length_normalize else None, self.tau)


def hinge_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float) -> Scores:
    """L = max(0, 1 - z): nothing pulls once the log-ratios are 1 / beta apart.

    Liu et al. (2023), arXiv 2309.06657, for the hinge of SLiC (arXiv 2305.10425) on log-ratios.
    """
    rewards = beta * (logps - ref_logps)
    return jax.nn.relu(1 - _margins(rewards)), rewards


@dataclasses.dataclass(frozen=True)
class Hinge(PairLoss):
    """The hinge loss of SLiC with a reference."""

    beta: float = positive(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return hinge_loss(logps, batch.ref_logps, self.beta)


def apo_zero_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float) -> Scores:
    """L = (1 - sigmoid(r_w)) + sigmoid(r_l): chosen up, rejected down, each on its own.

    D'Oosterlinck et al. (2024), arXiv 2408.06266, eq. 7, plus the constant 1 that keeps it positive. Rows far off on the wrong
    side have almost no gradient, since a plain sigmoid saturates on both sides.
    """
    rewards = beta * (logps - ref_logps)
    return jax.nn.sigmoid(-rewards[:, 0]) + jax.nn.sigmoid(rewards[:, 1]), rewards


@dataclasses.dataclass(frozen=True)
class ApoZero(PairLoss):
    """Anchored preference optimisation for chosen answers that are better than the model's own."""

    beta: float = positive(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return apo_zero_loss(logps, batch.ref_logps, self.beta)


def apo_down_loss(logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], beta: float) -> Scores:
    """L = sigmoid(r_w) + (1 - sigmoid(z)): both down, the rejected one further; at the start nothing moves the chosen one.

    D'Oosterlinck et al. (2024), arXiv 2408.06266, eq. 8, plus the constant 1.
    """
    rewards = beta * (logps - ref_logps)
    return jax.nn.sigmoid(rewards[:, 0]) + jax.nn.sigmoid(-_margins(rewards)), rewards


@dataclasses.dataclass(frozen=True)
class ApoDown(PairLoss):
    """Anchored preference optimisation for chosen answers that are worse than the model's own."""

    beta: float = positive(0.1)

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return apo_down_loss(logps, batch.ref_logps, self.beta)
