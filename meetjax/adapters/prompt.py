"""Making a soft prompt; where it is placed is `models/layout.py`'s affair."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from meetjax.adapters.tree import Prompt
from meetjax.errors import MeetjaxError
from meetjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """length vectors, started from the embeddings of `text` repeated to length (Lester et al. 2021, arXiv 2104.08691, sec. 3.2).

    A random start trains far worse, and zeros would be an empty slot. Several texts: one for each gate column.
    """

    length: int = 20
    text: str | tuple[str, ...] = "A helpful answer:"


def init_prompt(params: Params, spec: PromptSpec, token_ids: list[list[int]]) -> Prompt:
    """Vectors [E, length, D] float32 from the embedding rows of E texts' tokens."""
    if spec.length < 1 or not all(token_ids):
        raise MeetjaxError("prompt: nothing to train", expected="length >= 1 and a text", found=f"{spec.length}, {spec.text!r}")
    ids: Array = jnp.asarray([[own[i % len(own)] for i in range(spec.length)] for own in token_ids])
    return Prompt(params["embed"][ids].astype(jnp.float32))
