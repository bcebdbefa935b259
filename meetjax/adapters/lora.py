"""Making a LoRA: a random, b = 0, so that it starts as the base model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from meetjax.adapters.tree import Lora, LoraSite
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.types import Array


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """W + (alpha / rank) a b at each of `sites` (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""

    rank: int = 16
    alpha: float = 32.0
    sites: tuple[str, ...] = sites.LINEAR


def init_lora(config: ModelConfig, spec: LoraSpec, key: Array, entries: int = 1) -> Lora:
    """a [L, E, in, rank] uniform with variance 1 / (3 in), as PEFT starts it; b [L, E, rank, out] zero; float32."""
    if spec.rank < 1:
        raise MeetjaxError("lora: rank", expected=">= 1", found=spec.rank)
    fields = {}
    for name in sites.check_sites("lora", spec.sites, sites.LINEAR):
        width, out = sites.shape(config, sites.BLOCK[name])
        key, own = jax.random.split(key)
        bound = width**-0.5
        a = jax.random.uniform(own, (config.layers, entries, width, spec.rank), jnp.float32, -bound, bound)
        fields[name] = LoraSite(a, jnp.zeros((config.layers, entries, spec.rank, out), jnp.float32))
    return Lora(**fields, scale=spec.alpha / spec.rank)
