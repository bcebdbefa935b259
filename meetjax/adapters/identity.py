"""Making CLM's identity block: a copy of block 0 that does nothing yet."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from meetjax.adapters.tree import Identity
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.models.quant import plain
from meetjax.types import Params


@dataclasses.dataclass(frozen=True)
class IdentitySpec:
    """`blocks` copies of block `layer` in front of block 0; one copy of block 0 is the paper's setting (Zhu et al. 2025, arXiv
    2503.04346, sec. 4.1; its introduction says the last layer, its figure and code the first).
    """

    blocks: int = 1
    layer: int = 0


def init_identity(config: ModelConfig, params: Params, spec: IdentitySpec, entries: int = 1) -> Identity:
    """Leaves [blocks, E, ...] float32 copied from block `spec.layer`, integers as what they mean, with W_o = W_down = 0 and
    their biases, so that phi(h) = h exactly.
    """
    if spec.blocks < 1:
        raise MeetjaxError("identity: blocks", expected=">= 1", found=spec.blocks)
    if not -config.layers <= spec.layer < config.layers:
        raise MeetjaxError("identity: layer", expected=f"{-config.layers} to {config.layers - 1}", found=spec.layer)
    block = {}
    for name in sites.block_sites(config):
        leaf = plain(jax.tree.map(lambda x: x[spec.layer], params["blocks"][name])).astype(jnp.float32)
        if name in ("o", "down", "o_bias", "down_bias"):
            leaf = jnp.zeros_like(leaf)
        block[name] = jnp.broadcast_to(leaf, (spec.blocks, entries, *leaf.shape)).copy()
    return Identity(block)
