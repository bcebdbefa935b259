"""Axis letters and the batch that every objective reads.

B batch (prompts), C answers to one prompt (2 for a pair, 1 for a demonstration), T query length, S key length,
D width, F hidden, N query heads, K kv heads, H head width, V vocabulary, L layers, P prompt length, R rank,
A bank size (gate columns), E adapters of one kind in a bank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

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
Instruction = Literal["plain", "own", "other", "good", "bad"]
"""How a prompt asks for an answer: not at all, by the answer's class, by the other one, or by a class of its own."""
Params = dict[str, Any]
"""The frozen base: nested dicts of arrays, named in `models/sites.py`."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that the batch axis is split over; the names are those of `train/sharding.py`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Right-padded answers to B prompts, masks given by places in the row and never by token values.

    The C answers lie in K rows, C / K to a row. K = C: each behind its own copy of the prompt, `prompt + answer + EOS + padding`.
    K = 1: all behind one copy, `prompt + answer + EOS + answer + EOS + padding`, and none sees another. For pairs answer 0 is
    chosen and answer 1 is rejected.

    tokens:   int32[B, K, T]
    starts:   int32[B, C], index in its row of the answer's first token
    ends:     int32[B, C], index in its row behind the answer's EOS
    weights:  float32[B], 0 for prompts that only fill the batch
    gates:    float32[B, A] or None, the prompt's gate on each bank column (None: 1 everywhere)
    ref_logps: float32[B, C] or None, summed answer log-probabilities under the reference, in nats
    common:   int32[B], tokens at the front of a row that all its answers continue; None where a row has one answer
    token_weights: float32[B, K, T], a weight of each token for objectives that read tokens; None without
    classes:  int32[B], the class of the prompt's first answer (0 bad, 1 good, or any other numbering); None without labels
    """

    tokens: Int[Array, "B K T"]
    starts: Int[Array, "B C"]
    ends: Int[Array, "B C"]
    weights: Float[Array, " B"]
    gates: Float[Array, "B A"] | None = None
    ref_logps: Float[Array, "B C"] | None = None
    common: Int[Array, " B"] | None = None
    classes: Int[Array, " B"] | None = None
    token_weights: Float[Array, "B K T"] | None = None
