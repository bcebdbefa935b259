"""Summed answer log-probabilities without a [B, T, V] tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.models.config import ModelConfig
from meetjax.models.decoder import hidden_states
from meetjax.models.layers import logits
from meetjax.types import Array, Batch, Params

CHUNK = 256
"""Positions whose logits exist at one time: 50 MB for a vocabulary of 49,152."""


def token_logps(params: Params, hidden: Float[Array, "M D"], targets: Int[Array, " M"]) -> Float[Array, " M"]:
    """log p(target) in nats at each position, float32, in chunks whose logits are recomputed in the backward pass."""
    spare = -hidden.shape[0] % CHUNK
    hidden = jnp.pad(hidden, ((0, spare), (0, 0))).reshape(-1, CHUNK, hidden.shape[-1])
    padded = jnp.pad(targets, (0, spare)).reshape(-1, CHUNK)

    @jax.checkpoint
    def chunk(h: Array, target: Array) -> Array:
        scores = logits(params, h)
        return jnp.take_along_axis(scores, target[:, None], axis=1)[:, 0] - jax.nn.logsumexp(scores, axis=1)

    return jax.lax.map(lambda pair: chunk(*pair), (hidden, padded)).reshape(-1)[: targets.shape[0]]


def answer_mask(starts: Int[Array, "... "], lengths: Int[Array, "..."], width: int) -> Float[Array, "... T-1"]:
    """1 where position t predicts an answer token or its EOS, i.e. start <= t + 1 < length: from lengths, never from values."""
    target = jnp.expand_dims(jnp.arange(1, width), tuple(range(starts.ndim)))
    return ((target >= starts[..., None]) & (target < lengths[..., None])).astype(jnp.float32)


def answer_logps(config: ModelConfig, params: Params, adapters: Any, batch: Batch) -> Float[Array, "B C"]:
    """s(y) = sum_t m_t log pi(y_t | x, y_<t) in nats for each of the C answers to each prompt, EOS included."""
    prompts, answers, width = batch.tokens.shape
    tokens = batch.tokens.reshape(prompts * answers, width)
    gates = None if batch.gates is None else jnp.repeat(batch.gates, answers, axis=0)
    hidden = hidden_states(config, params, tokens, adapters, gates)
    scores = token_logps(params, hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1))
    mask = answer_mask(batch.starts, batch.lengths, width)
    return jnp.sum(scores.reshape(prompts, answers, width - 1) * mask, axis=-1)


compiled_answer_logps = partial(jax.jit, static_argnums=0)(answer_logps)
"""`answer_logps` as one program for all who only score: references, held-out pairs, the self-test."""
