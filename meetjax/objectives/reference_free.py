"""Losses on pairs of answers without a reference model: ORPO, SimPO and CPO.

    s(y) sums log-probabilities over the answer's n(y) tokens, EOS included;   a(y) = s(y) / n(y)    both in nats

Each logs its own implicit reward. Likelihood terms are means per answer and then over pairs: the batch has one normaliser, its
number of pairs, which no split into micro-batches changes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.objectives.bounds import not_negative, positive
from meetjax.objectives.preference import PairLoss, Scores, answer_tokens
from meetjax.types import Array, Batch

CERTAIN = -1e-4
"""Nats a token. The odds of an answer have the slope 1 / (1 - e^a), at most 1e4 (and a half) with a no larger than this."""


def log_odds(a: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """lo(a) = a - log(1 - e^a) of mean log-probabilities a < 0, which are taken to be at most `CERTAIN`.

    Above -ln 2 the difference 1 - e^a cancels and is an expm1; below, e^a is small and the logarithm a log1p.
    """
    a = jnp.minimum(a, CERTAIN)
    return a - jnp.where(a > -math.log(2), jnp.log(-jnp.expm1(a)), jnp.log1p(-jnp.exp(a)))


def orpo_loss(logps: Float[Array, "B 2"], tokens: Float[Array, "B 2"], weight: float) -> Scores:
    """L = -a(y_w) - lambda log sigmoid(lo(y_w) - lo(y_l)); rewards lambda lo(y).

    Hong, Lee and Thorne (2024), arXiv 2403.07691, eqs. 6 and 7. The likelihood is of the answer alone; trl's is of prompt and
    answer, over all tokens of the batch, and its rewards are lambda a(y), which order answers alike.
    """
    a = logps / tokens
    odds = log_odds(a)
    return -a[:, 0] - weight * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1]), weight * odds


@dataclasses.dataclass(frozen=True)
class Orpo(PairLoss):
    """Odds ratio preference optimisation: imitation of the chosen answer and, with `weight` (lambda), its odds over the rejected."""

    weight: float = not_negative(0.1)
    needs_reference: ClassVar[bool] = False

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return orpo_loss(logps, answer_tokens(batch), self.weight)


def simpo_loss(logps: Float[Array, "B 2"], tokens: Float[Array, "B 2"], beta: float, gamma: float) -> Scores:
    """L = -log sigmoid(beta (a(y_w) - a(y_l)) - gamma); rewards beta a(y).

    Meng, Xia and Chen (2024), arXiv 2405.14734, eq. 6.
    """
    rewards = beta * logps / tokens
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1] - gamma), rewards


@dataclasses.dataclass(frozen=True)
class Simpo(PairLoss):
    """Simple preference optimisation; the wanted margin gamma is given as a fraction of beta, as its authors tune it."""

    beta: float = positive(2.0)
    gamma_beta_ratio: float = not_negative(0.5)
    needs_reference: ClassVar[bool] = False

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return simpo_loss(logps, answer_tokens(batch), self.beta, self.gamma_beta_ratio * self.beta)


def cpo_loss(logps: Float[Array, "B 2"], tokens: Float[Array, "B 2"], beta: float, alpha: float) -> Scores:
    """L = -log sigmoid(beta (s(y_w) - s(y_l))) - alpha a(y_w): DPO under a uniform reference, and imitation; rewards beta s(y).

    Xu et al. (2024), arXiv 2401.08417, eq. 3. trl's likelihood is a mean over all chosen tokens of the batch.
    """
    rewards = beta * logps
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]) - alpha * logps[:, 0] / tokens[:, 0], rewards


@dataclasses.dataclass(frozen=True)
class Cpo(PairLoss):
    """Contrastive preference optimisation; `alpha` weighs the likelihood of the chosen answer."""

    beta: float = positive(0.1)
    alpha: float = not_negative(1.0)
    needs_reference: ClassVar[bool] = False

    def scores(self, logps: Float[Array, "B 2"], batch: Batch) -> Scores:
        return cpo_loss(logps, answer_tokens(batch), self.beta, self.alpha)
