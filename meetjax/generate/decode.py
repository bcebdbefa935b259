"""One compiled program from prompts to tokens: prefill, then a loop that ends when every row has."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.generate.sampling import RowSampling, sample
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import decode_step, prefill
from meetjax.models.layers import logits
from meetjax.types import Array, Params


@partial(jax.jit, static_argnums=0, static_argnames="max_new_tokens")
def generate_tokens(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    pad: Int[Array, " B"],
    rows: RowSampling,
    adapters: Any = None,
    gates: Float[Array, "B A"] | None = None,
    dial: Float[Array, " B"] | None = None,
    limit: Int[Array, " B"] | None = None,
    *,
    max_new_tokens: int,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """(new tokens [B, max_new_tokens], how many of them count, EOS included) for left-padded prompts; params unstacked.

    limit: int32[B], tokens a row may have at most (None: max_new_tokens).
    """
    stop = jnp.asarray(config.eos_token_ids or (-1,), jnp.int32)
    batch, width = tokens.shape
    most = jnp.full(batch, max_new_tokens, jnp.int32) if limit is None else limit
    hidden, cache = prefill(config, params, tokens, pad, width + max_new_tokens, adapters, gates, dial)
    first = sample(logits(params, hidden), rows, jnp.int32(0))
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)
    count = jnp.ones(batch, jnp.int32)
    done = jnp.isin(first, stop) | (most <= 1)

    def going(carry: Any) -> Array:
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def body(carry: Any) -> Any:
        step, last, done, count, out, cache = carry
        hidden, cache = decode_step(config, params, last, cache, adapters, gates, dial)
        new = sample(logits(params, hidden), rows, step)
        new = jnp.where(done, 0, new)
        out = jax.lax.dynamic_update_slice_in_dim(out, new[:, None], step, axis=1)
        count = count + (~done).astype(jnp.int32)
        return step + 1, new, done | jnp.isin(new, stop) | (count >= most), count, out, cache

    start = (jnp.int32(1), first, done, count, out, cache)
    _, _, _, count, out, _ = jax.lax.while_loop(going, body, start)
    return out, count
