"""Choosing the next token, each row by its own rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.errors import MeetjaxError
from meetjax.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Applied in this order: temperature, top-k, top-p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for field, ok, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), ">= 0 and finite"),
            ("top_k", 0 <= self.top_k < 2**31, "0 to 2^31 - 1"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not ok:
                raise MeetjaxError(f"sampling: {field}", expected=expected, found=getattr(self, field))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """The same settings as arrays, one value a row, so that a batch mixes them in one compiled program."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: Int[Array, " B"]


def filtered(logits: Float[Array, "B V"], rows: RowSampling) -> Float[Array, "B V"]:
    """Scaled logits with everything outside top-k and top-p (Holtzman et al. 2020, arXiv 1904.09751) at -inf.

    Sorting a vocabulary takes longer than the model: nothing is sorted unless a row asks for it.
    """
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    return jax.lax.cond(jnp.any((rows.top_k > 0) | (rows.top_p < 1)), _cut, lambda scaled, _: scaled, scaled, rows)


def _cut(scaled: Float[Array, "B V"], rows: RowSampling) -> Float[Array, "B V"]:
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])[None]
    mass = jax.nn.softmax(jnp.where((rows.top_k[:, None] == 0) | (rank < rows.top_k[:, None]), ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    keep = (before < rows.top_p[:, None]) & (mass > 0)
    keep = keep.at[:, 0].set(True)
    kept = jnp.where(keep, ranked, -jnp.inf)
    return jnp.put_along_axis(jnp.zeros_like(scaled), order, kept, axis=-1, inplace=False)


def sample(logits: Float[Array, "B V"], rows: RowSampling, step: Int[Array, ""] | Int[Array, " B"]) -> Int[Array, " B"]:
    """Next token of each row; step: tokens so far, of all or of each. A row's draw depends on its own seed and step alone."""
    greedy = _argmax(logits)

    def draw() -> Array:
        steps = jnp.broadcast_to(step, rows.seed.shape)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(rows.seed, steps)
        drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits, rows)).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)


def _argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first token with the most, as `jnp.argmax`, which on CPU goes one by one (8 rows of 49,152: 1.6 ms in place of 0.4)."""
    vocabulary = logits.shape[1]
    places = jnp.arange(vocabulary, dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(logits == jnp.max(logits, axis=1, keepdims=True), places, vocabulary), axis=1)
    return jnp.minimum(first, vocabulary - 1)  # what is not a number is no maximum
