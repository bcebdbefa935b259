"""The Bradley-Terry reward model: a linear head on the trunk scores an answer, trained so that the chosen one scores higher.

    R(x, y) = u . h(x, y)    h the normed hidden state at the answer's last token, its EOS; log-odds, in nats

Pairs teach differences between answers to one prompt; rewards of different prompts compare only as far as they are centred.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.adapters.tree import Bank
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.models.layers import head_rewards
from meetjax.models.streams import kind_gates
from meetjax.objectives.bounds import not_negative
from meetjax.objectives.logps import answer_states
from meetjax.objectives.preference import PairLoss, Scores
from meetjax.types import Array, Batch, Params


def answer_rewards(config: ModelConfig, params: Params, adapters: Bank, batch: Batch) -> Float[Array, "B C"]:
    """R(x, y) of each of the C answers to each prompt under its gates. Raises MeetjaxError for a bank without a reward head."""
    if adapters.reward is None:
        raise MeetjaxError("rewards: the bank has no reward head", fix="train RewardSpec() in this stage or in an earlier one")
    hidden = answer_states(config, params, adapters, batch)
    last = batch.ends.reshape(hidden.shape[0], -1, 1) - 1  # by place: a padding token may be EOS too
    states = jnp.take_along_axis(hidden, last, axis=1).reshape(*batch.ends.shape, -1)
    return head_rewards(states, adapters.reward, kind_gates(adapters, "reward", batch.gates))


compiled_answer_rewards = partial(jax.jit, static_argnums=0)(answer_rewards)
"""`answer_rewards` as one program for all who only score."""


def bradley_terry_loss(chosen: Float[Array, " B"], rejected: Float[Array, " B"], kappa: float, margin: float) -> Float[Array, " B"]:
    """L = -log sigmoid(R_w - R_l - m) + kappa (R_w + R_l)^2.

    The first term is that of Bradley and Terry (1952), with the margin m of Touvron et al. (2023), arXiv 2307.09288, eq. 2; it
    leaves a constant free for each prompt, which the second fixes: Eisenstein et al. (2023), arXiv 2312.09244, eq. 2.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + kappa * jnp.square(chosen + rejected)


@dataclasses.dataclass(frozen=True)
class BradleyTerry(PairLoss):
    """A reward model; `kappa` centres its rewards about 0 (0.01 is recommended), `margin` in nats moves every pair further apart."""

    kappa: float = not_negative(0.0)
    margin: float = not_negative(0.0)
    needs_reference: ClassVar[bool] = False
    reads_rewards: ClassVar[bool] = True

    def scores(self, rewards: Float[Array, "B 2"], batch: Batch) -> Scores:
        return bradley_terry_loss(rewards[:, 0], rewards[:, 1], self.kappa, self.margin), rewards
