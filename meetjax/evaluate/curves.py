"""What a dial does: reward margin and KL to the base against strength, on held-out pairs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from meetjax.adapters.algebra import at_strength
from meetjax.adapters.tree import Bank
from meetjax.data.loader import Buckets, eval_batches
from meetjax.data.tokenize import Rows
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import hidden_states
from meetjax.models.layers import logits
from meetjax.objectives.logps import CHUNK, answer_mask
from meetjax.types import Array, Params

forward = partial(jax.jit, static_argnums=0)(hidden_states)


@jax.jit
def _compare(
    params: Params, ours: Float[Array, "M D"], theirs: Float[Array, "M D"], targets: Int[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """(log-ratio of the target, KL(ours || theirs) over the vocabulary) at each position, in nats."""

    def chunk(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        log_p, log_q = (jax.nn.log_softmax(logits(params, h), axis=-1) for h in part[:2])
        ratio = log_p - log_q
        return jnp.take_along_axis(ratio, part[2][:, None], axis=1)[:, 0], jnp.sum(jnp.exp(log_p) * ratio, axis=-1)

    chunks = (ours.reshape(-1, CHUNK, ours.shape[1]), theirs.reshape(-1, CHUNK, ours.shape[1]), targets.reshape(-1, CHUNK))
    ratio, kl = jax.lax.map(chunk, chunks)
    return ratio.reshape(-1), kl.reshape(-1)


def dial_curve(
    config: ModelConfig, params: Params, bank: Bank, rows: Rows, buckets: Buckets, strengths: tuple[float, ...], batch_size: int = 4
) -> list[dict[str, float]]:
    """One point {strength, reward_margin, kl} a strength, means over the pairs in `rows`.

    reward_margin: (s - s_ref) of the chosen less the rejected answer, in nats; kl: KL(dialled || base) over the vocabulary, in nats
    a token, at the answer positions of both. The head sees answer positions only. Where the dial mixes logits, which are linear in
    the normed hidden state, the adapted model runs once for all strengths.
    """
    totals = {strength: np.zeros(2) for strength in strengths}
    for batch, _ in eval_batches(rows, batch_size, buckets):
        _, answers, width = batch.tokens.shape
        tokens = batch.tokens.reshape(-1, width)
        answered = np.asarray(answer_mask(batch.starts, batch.lengths, width)) * (batch.weights > 0)[:, None, None]
        row, place = np.nonzero(answered.reshape(-1, width - 1))
        sign = np.where(row % answers == 0, 1.0, -1.0)
        spare = -len(row) % CHUNK

        def positions(hidden: Array, row=row, place=place, spare=spare) -> np.ndarray:
            return np.pad(np.asarray(hidden)[row, place], ((0, spare), (0, 0)))

        base = positions(forward(config, params, tokens))
        for strength, ours in _dialled(config, params, bank, tokens, base, positions, strengths):
            ratio, kl = (np.asarray(x)[: len(row)] for x in _compare(params, ours, base, np.pad(tokens[row, place + 1], (0, spare))))
            totals[strength] += ((sign * ratio).sum(), kl.sum())
    answer_tokens = float((rows.lengths - rows.starts).sum())
    return [{"strength": s, "reward_margin": total[0] / len(rows), "kl": total[1] / answer_tokens} for s, total in totals.items()]


def _dialled(config: ModelConfig, params: Params, bank: Bank, tokens: np.ndarray, base: np.ndarray, positions: Any, strengths: Any):
    """Yields (strength, hidden states at the answer positions)."""
    if bank.prompt is not None or (bank.identity is not None and bank.lora is None and bank.edit is None):
        adapted = positions(forward(config, params, tokens, bank))
        yield from ((strength, strength * adapted + (1 - strength) * base) for strength in strengths)
        return
    for strength in strengths:
        gates, _ = at_strength(bank, strength)
        yield strength, positions(forward(config, params, tokens, bank, np.tile(np.asarray(gates, np.float32), (len(tokens), 1))))
