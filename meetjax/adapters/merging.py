"""Merging trained weights: linear, Slerp, DARE, TIES, on whole bases, edits, soft prompts, and LoRAs as the weights that they add.

A tree here is any tree of arrays; those merged together have one structure and one shape a leaf. DARE and TIES take differences from a
common base: `delta = linear([tuned, base], [1, -1])`, and `linear([base, merged], [1, strength])` puts what was merged back. Edits are
differences already, as zero is neutral for them. The factors of a LoRA are not: (a1 + a2)(b1 + b2) has cross terms that no adapter
learnt, so a tree that holds one is refused, and `lora_delta`, `to_lora` and `merge_delta` go by way of its product.

A leaf with stacked layers is one vector to Slerp and to the trim of TIES; `models.decoder.unstack` makes it one a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from meetjax.adapters.tree import Lora, LoraSite
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.quant import dequantize_params, is_quantized
from meetjax.types import Array, Params

Delta = dict[str, Float[Array, "..."]]
"""Site -> float32[L, in, out], what is added to its weight."""
PARALLEL = 1e-6
"""Sine of an angle below which an arc is a line: the two differ by less than float32 resolves."""


def linear(trees: Sequence[Any], weights: Sequence[float]) -> Any:
    """sum_i w_i tree_i, leaf by leaf; the weights are taken as they are (task arithmetic, Ilharco et al. 2023, arXiv 2212.04089)."""
    weights = _weights(trees, weights)
    return _leafwise(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), trees)


def slerp(a: Any, b: Any, t: float) -> Any:
    """sin((1-t)W)/sin W a + sin(tW)/sin W b with W the angle between a and b as flat vectors (Shoemake 1985), leaf by leaf.

    t = 0 is a and t = 1 is b, to the bit. Where an arc is not defined (equal, parallel, opposite or zero leaves) it is the line.
    """

    def one(p: Array, q: Array) -> Array:
        # Two-argument arctangent of half the angle (Kahan): the arccosine of a product of float32 knows small angles to 4e-4 only.
        u, v = (x / jnp.maximum(jnp.linalg.norm(x.ravel()), jnp.finfo(x.dtype).tiny) for x in (p, q))
        angle = 2 * jnp.arctan2(jnp.linalg.norm((u - v).ravel()), jnp.linalg.norm((u + v).ravel()))
        curved = (jnp.sin(angle) > PARALLEL) & (jnp.vdot(p, p) > 0) & (jnp.vdot(q, q) > 0)
        sine = jnp.where(curved, jnp.sin(angle), 1.0)
        arc = jnp.sin((1 - t) * angle) / sine * p + jnp.sin(t * angle) / sine * q
        # From the nearer end, so that both ends and equal leaves come back exactly.
        line = jnp.where(t < 0.5, p + t * (q - p), q - (1 - t) * (q - p))
        return jnp.where(curved, arc, line)

    return _leafwise(one, (a, b))


def dare(delta: Any, key: Array, drop: float) -> Any:
    """Every entry is 0 with probability `drop` and else divided by 1 - drop, so its mean stays (Yu et al. 2024, arXiv 2311.03099).

    drop = 0 is the identity. Raises MeetjaxError unless 0 <= drop < 1.
    """
    if not 0 <= drop < 1:
        raise MeetjaxError("dare: drop", expected="at least 0 and less than 1", found=drop)
    count = iter(range(len(jax.tree.leaves(delta))))

    def one(leaf: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, next(count)), 1 - drop, leaf.shape)
        return jnp.where(kept, leaf / (1 - drop), 0.0)

    return _leafwise(one, (delta,))


def ties(deltas: Sequence[Any], weights: Sequence[float], density: float) -> Any:
    """Trim, elect, merge (Yadav et al. 2023, arXiv 2306.01708, algorithm 1 with weights), leaf by leaf.

    Each delta keeps its `density` largest entries by magnitude (all that equal the last one kept); the sign of sum_i w_i delta_i is
    elected; the result is the mean, weighted by w_i, of the entries of that sign, and 0 where there is none. Weights count only
    against each other. Raises MeetjaxError unless 0 < density <= 1, and for negative weights or no positive one.
    """
    if not 0 < density <= 1:
        raise MeetjaxError("ties: density", expected="more than 0 and at most 1", found=density)
    weights = _weights(deltas, weights)
    if min(weights) < 0 or max(weights) == 0:
        raise MeetjaxError("ties: weights", expected="shares of a mean, none negative and one positive", found=weights)

    def one(*leaves: Array) -> Array:
        shares = [jnp.float32(w) for w in weights]
        trimmed = [_trim(leaf, density) for leaf in leaves]
        positive = sum(w * leaf for w, leaf in zip(shares, trimmed, strict=True)) >= 0
        agrees = [(leaf != 0) & ((leaf > 0) == positive) for leaf in trimmed]
        total = sum(jnp.where(yes, w * leaf, 0.0) for w, leaf, yes in zip(shares, trimmed, agrees, strict=True))
        share = sum(jnp.where(yes, w, 0.0) for w, yes in zip(shares, agrees, strict=True))
        return jnp.where(share > 0, total / jnp.where(share > 0, share, 1.0), 0.0)

    return _leafwise(one, deltas)


def dare_ties(deltas: Sequence[Any], weights: Sequence[float], key: Array, drop: float) -> Any:
    """TIES with the random drop of DARE, another one for each delta, in place of its trim."""
    return ties([dare(delta, jax.random.fold_in(key, i), drop) for i, delta in enumerate(deltas)], weights, 1.0)


def lora_delta(lora: Lora) -> Delta:
    """What a LoRA adds to each weight at gate 1: scale a b, as large as the weights themselves.

    Raises MeetjaxError for a bank of several gate columns.
    """
    if len(set(lora.entries)) != 1:
        raise MeetjaxError("lora_delta", expected="one LoRA", found=f"a bank of {len(lora.entries)}", fix="merge them one by one")
    found = {name: getattr(lora, name) for name in sites.LINEAR}
    return {name: jnp.einsum("leir,lero->lio", site.a, site.b) * lora.scale for name, site in found.items() if site is not None}


def merge_delta(params: Params, delta: Delta) -> Params:
    """The base with `delta` added to its weights, each in its own dtype. Raises MeetjaxError for a site or shape of another base."""
    params = dequantize_params(params)
    blocks = dict(params["blocks"])
    for name, leaf in delta.items():
        found = tuple(blocks[name].shape) if name in sites.LINEAR and name in blocks else "no such site"
        if found != tuple(leaf.shape):
            raise MeetjaxError(f"merge_delta: {name}", expected=tuple(leaf.shape), found=found, fix="merge into the base it was made for")
        blocks[name] = (jnp.asarray(blocks[name], jnp.float32) + leaf).astype(blocks[name].dtype)
    return params | {"blocks": blocks}


def to_lora(delta: Delta, rank: int) -> tuple[Lora, dict[str, float]]:
    """The nearest LoRA of this rank (truncated SVD, Eckart and Young 1936), and by site what it misses: |delta - a b| / |delta|.

    The norms are Frobenius, over all layers of the site. Raises MeetjaxError for no site, an unknown one, or a rank that a site
    does not have.
    """
    found, missed = {}, {}
    for name in sites.check_sites("to_lora", tuple(delta), sites.LINEAR):
        leaf = jnp.asarray(delta[name], jnp.float32)
        if not 1 <= rank <= min(leaf.shape[1:]):
            raise MeetjaxError(f"to_lora: rank at {name}", expected=f"1 to {min(leaf.shape[1:])}", found=rank)
        left, values, right = jnp.linalg.svd(leaf, full_matrices=False)
        root = jnp.sqrt(values[:, :rank])  # in both factors, so that neither dwarfs the other where training goes on
        found[name] = LoraSite((left[:, :, :rank] * root[:, None])[:, None], (root[:, :, None] * right[:, :rank])[:, None])
        rest, whole = (float(jnp.linalg.norm(part)) for part in (values[:, rank:], values))
        missed[name] = rest / whole if whole else 0.0
    return Lora(**found), missed


def _trim(leaf: Array, density: float) -> Array:
    size = leaf.size
    kept = max(1, round(density * size))
    if kept >= size:
        return leaf
    magnitude = jnp.abs(leaf)
    return jnp.where(magnitude >= jnp.sort(magnitude.ravel())[size - kept], leaf, 0.0)


def _weights(trees: Sequence[Any], weights: Sequence[float]) -> list[float]:
    """The weights as plain numbers. Raises MeetjaxError unless there is one a tree, and one at least."""
    weights = [float(weight) for weight in weights]
    if len(weights) != len(trees) or not weights:
        raise MeetjaxError("merging: weights", expected=f"{len(trees) or 'one or more'}, one a tree", found=len(weights))
    if not all(map(math.isfinite, weights)):
        raise MeetjaxError("merging: weights", expected="finite numbers", found=weights)
    return weights


def _leafwise(function: Callable[..., Any], trees: Sequence[Any]) -> Any:
    """`function` of the leaves in float32, back in the dtype of the first tree's.

    Raises MeetjaxError for LoRA factors, quantised leaves and misfits.
    """
    factors = jax.tree.leaves(list(trees), is_leaf=lambda node: is_quantized(node) or isinstance(node, Lora | LoraSite))
    if any(map(is_quantized, factors)):
        raise MeetjaxError("merging: a quantised base", expected="whole weights", found="integers", fix="use quant.dequantize_params first")
    if any(isinstance(node, Lora | LoraSite) for node in factors):
        fix = "merge lora_delta of each, then to_lora or merge_delta; or keep them exact with algebra.mix"
        raise MeetjaxError("merging: the factors of a LoRA", expected="weights, edits, prompts or LoRA deltas", found="Lora", fix=fix)
    first, *others = trees
    for other in others:
        if jax.tree.structure(other) != jax.tree.structure(first):
            found = f"{jax.tree.structure(first)} and {jax.tree.structure(other)}"
            raise MeetjaxError("merging: trees differ", expected="one structure", found=found, fix="merge models or adapters of one shape")
        for (path, leaf), like in zip(jax.tree_util.tree_flatten_with_path(other)[0], jax.tree.leaves(first), strict=True):
            if leaf.shape != like.shape:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise MeetjaxError(f"merging: shape of {where}", expected=tuple(like.shape), found=tuple(leaf.shape))
    return jax.tree.map(lambda *leaves: function(*(jnp.asarray(x, jnp.float32) for x in leaves)).astype(leaves[0].dtype), *trees)
