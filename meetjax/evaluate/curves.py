"""What a dial does: reward margin and KL to the base against strength, on held-out pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
from meetjax.models.layers import logits
from meetjax.objectives.head import CHUNK
from meetjax.objectives.logps import answer_places, answer_states
from meetjax.types import Array, Batch, Params

forward = partial(jax.jit, static_argnums=0)(answer_states)


@jax.jit
def compare(
    params: Params, other: Params, ours: Float[Array, "M D"], theirs: Float[Array, "M D"], targets: Int[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """(log-ratio of the target, KL(ours || theirs) over the vocabulary) at each position, in nats; M a multiple of `CHUNK`."""

    def chunk(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        log_p, log_q = (jax.nn.log_softmax(logits(head, h), axis=-1) for head, h in ((params, part[0]), (other, part[1])))
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
        answer, targets, positions = answer_positions(batch)
        base = positions(forward(config, params, None, batch))
        for strength, ours in _dialled(config, params, bank, batch, base, positions, strengths):
            ratio, kl = (np.asarray(x)[: len(answer)] for x in compare(params, params, ours, base, targets))
            totals[strength] += (np.where(answer % 2 == 0, ratio, -ratio).sum(), kl.sum())
    answer_tokens = float((rows.lengths - rows.starts).sum())
    return [{"strength": s, "reward_margin": total[0] / len(rows), "kl": total[1] / answer_tokens} for s, total in totals.items()]


def answer_positions(batch: Batch) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " M"], Callable[[Array], np.ndarray]]:
    """(which of the batch's answers each of its m answer tokens belongs to, b C + c; their ids; what picks their hidden states).

    Ids and states are filled up to M, a multiple of `CHUNK`. Prompts of weight 0 have no answers here.
    """
    _, per_prompt, width = batch.tokens.shape
    owner, source = (np.asarray(places) for places in answer_places(batch))
    row, place = np.nonzero((owner >= 0) & np.repeat(batch.weights > 0, per_prompt)[:, None])
    spare = -len(row) % CHUNK
    targets = np.pad(np.asarray(batch.tokens).reshape(-1, width)[row, place], (0, spare))

    def positions(hidden: Array) -> np.ndarray:
        return np.pad(np.asarray(hidden)[row, source[row, place]], ((0, spare), (0, 0)))

    return row * (batch.starts.shape[1] // per_prompt) + owner[row, place], targets, positions


def _dialled(config: ModelConfig, params: Params, bank: Bank, batch: Batch, base: np.ndarray, positions: Any, strengths: Any):
    """Yields (strength, hidden states at the answer positions)."""
    if bank.prompt is not None or (bank.identity is not None and bank.lora is None and bank.edit is None):
        adapted = positions(forward(config, params, bank, batch))
        yield from ((strength, strength * adapted + (1 - strength) * base) for strength in strengths)
        return
    for strength in strengths:
        gates, _ = at_strength(bank, strength)
        gated = dataclasses.replace(batch, gates=np.tile(np.asarray(gates, np.float32), (len(batch.weights), 1)))
        yield strength, positions(forward(config, params, bank, gated))
