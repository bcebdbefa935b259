"""Axis letters and the batch that every objective reads.

B batch (prompts), C answers to one prompt (2 for a pair, 1 for a demonstration), T query length, S key length,
D width, F hidden, N query heads, K kv heads, H head width, V vocabulary, L layers, P prompt length, R rank,
A bank size (gate columns), E adapters of one kind in a bank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, Int

# To a type checker an array is Any: jax, numpy and optax disagree on names for the same thing, and shapes are what matters here.
if TYPE_CHECKING:
    Array = Any
else:
    Array = jax.Array | np.ndarray
Tokenizer = Any
"""A fast transformers tokenizer."""
Params = dict[str, Any]
"""The frozen base: nested dicts of arrays, named in `models/sites.py`."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that the batch axis is split over; the names are those of `train/sharding.py`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Right-padded answers to B prompts, masks given by lengths and never by token values.

    Row [b, c] is `prompt + answer + EOS + padding`. For pairs c = 0 is chosen and c = 1 is rejected.

    tokens:   int32[B, C, T]
    starts:   int32[B, C], tokens of the prompt, i.e. index of the first answer token
    lengths:  int32[B, C], tokens before the padding, EOS included
    weights:  float32[B], 0 for rows that only fill the batch
    gates:    float32[B, A] or None, the row's gate on each bank column (None: 1 everywhere)
    ref_logps: float32[B, C] or None, summed answer log-probabilities under the reference, in nats
    """

    tokens: Int[Array, "B C T"]
    starts: Int[Array, "B C"]
    lengths: Int[Array, "B C"]
    weights: Float[Array, " B"]
    gates: Float[Array, "B A"] | None = None
    ref_logps: Float[Array, "B C"] | None = None
