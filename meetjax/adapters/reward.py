"""Making a reward head: what a Bradley-Terry reward model reads of its trunk."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from meetjax.adapters.tree import Reward
from meetjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """A linear head on the hidden state of an answer's last token; train it with adapters on the trunk, or alone as a probe."""


def init_reward(config: ModelConfig, entries: int = 1) -> Reward:
    """u = 0, [E, D] float32: every reward starts at 0, so the loss at ln 2.

    There is no bias: between two answers it cancels, and the heads of transformers' reward models have none either.
    """
    return Reward(jnp.zeros((entries, config.width), jnp.float32))
