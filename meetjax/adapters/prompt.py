"""Making a soft prompt; where it is placed is `models/attention.py`'s affair."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from meetjax.adapters.tree import Prompt
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """length vectors, started from the embeddings of `text` repeated to length (Lester et al. 2021, arXiv 2104.08691, sec. 3.2).

    A random start trains far worse, and zeros would be an empty slot.
    """

    length: int = 20
    text: str = "A helpful answer:"


def init_prompt(config: ModelConfig, params: Params, spec: PromptSpec, token_ids: list[int]) -> Prompt:
    """Vectors [1, length, D] float32 from the embedding rows of `token_ids`, the tokens of `spec.text`."""
    if spec.length < 1 or not token_ids:
        raise MeetjaxError("prompt: nothing to train", expected="length >= 1 and a text", found=f"{spec.length}, {spec.text!r}")
    ids: Array = jnp.asarray([token_ids[i % len(token_ids)] for i in range(spec.length)])
    return Prompt(params["embed"][ids].astype(jnp.float32)[None])
