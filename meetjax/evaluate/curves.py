"""What a dial does: reward margin and KL against strength, with every strength through one compiled program."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from meetjax.adapters.algebra import at_strength
from meetjax.adapters.tree import Bank
from meetjax.data.loader import default_buckets, eval_batches
from meetjax.data.tokenize import Rows
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import hidden_states
from meetjax.models.layers import logits
from meetjax.objectives.logps import CHUNK, answer_mask
from meetjax.types import Array, Batch, Params


@partial(jax.jit, static_argnums=0)
def _scores(config: ModelConfig, params: Params, bank: Bank, batch: Batch, gates: Array, dial: Array | None) -> tuple[Array, Array]:
    """(margin of summed log-ratios [B], KL to the base summed over both answers' tokens [B]) of pairs at one strength."""
    prompts, answers, width = batch.tokens.shape
    tokens = batch.tokens.reshape(-1, width)
    rows = jnp.broadcast_to(gates, (tokens.shape[0], gates.shape[0]))
    dials = None if dial is None else jnp.broadcast_to(dial, tokens.shape[:1])
    dialled = hidden_states(config, params, tokens, bank, rows, dial=dials)
    base = hidden_states(config, params, tokens)

    def chunk(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        ours, theirs, target = part
        log_p, log_q = (jax.nn.log_softmax(logits(params, h), axis=-1) for h in (ours, theirs))
        ratio = log_p - log_q
        return jnp.take_along_axis(ratio, target[:, None], axis=1)[:, 0], jnp.sum(jnp.exp(log_p) * ratio, axis=-1)

    flat = [h[:, :-1].reshape(-1, h.shape[-1]) for h in (dialled, base)] + [tokens[:, 1:].reshape(-1)]
    spare = -flat[0].shape[0] % CHUNK
    chunks = [jnp.pad(x, ((0, spare),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, CHUNK, *x.shape[1:]) for x in flat]
    ratio, kl = (x.reshape(-1)[: flat[0].shape[0]].reshape(prompts, answers, width - 1) for x in jax.lax.map(chunk, tuple(chunks)))
    mask = answer_mask(batch.starts, batch.lengths, width)
    log_ratio = jnp.sum(ratio * mask, axis=-1)
    return log_ratio[:, 0] - log_ratio[:, 1], jnp.sum(kl * mask, axis=(1, 2))


def margin_and_kl(
    config: ModelConfig, params: Params, bank: Bank, rows: Rows, strength: float, batch_size: int = 8
) -> tuple[Float[np.ndarray, " N"], float]:
    """Implicit reward margin of each held-out pair, s - s_ref chosen less rejected, in nats; and mean KL(dialled || base) in nats a token.

    The KL is taken at every answer position of the pairs, over the whole vocabulary.
    """
    gates, dial = at_strength(bank, strength)
    margins, divergence = np.zeros(len(rows)), 0.0
    for batch, chosen in eval_batches(rows, batch_size, default_buckets(int(rows.lengths.max()))):
        dialled = None if dial is None else jnp.float32(dial)
        values, kl = (np.asarray(x) for x in _scores(config, params, bank, batch, jnp.asarray(gates, jnp.float32), dialled))
        real = batch.weights > 0
        margins[chosen[real]] = values[real]
        divergence += float(kl[real].sum())
    return margins, divergence / float((rows.lengths - rows.starts).sum())
