"""Making a representation edit (RED)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from meetjax.adapters.tree import Edit, EditSite
from meetjax.models import sites
from meetjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class EditSpec:
    """Scale and bias on the outputs of `sites`: ("down",) is RED, `sites.EDITABLE` is RED+ (Wu et al. 2024, arXiv 2402.15179)."""

    sites: tuple[str, ...] = ("down",)


def init_edit(config: ModelConfig, spec: EditSpec, entries: int = 1) -> Edit:
    """s = t = 0, [L, E, out], always float32: in bfloat16 a step of 1e-3 is lost beside 1 and the vectors stand still."""
    zeros = {
        name: jnp.zeros((config.layers, entries, sites.shape(config, sites.BLOCK[name])[-1]), jnp.float32)
        for name in sites.check_sites("edit", spec.sites, sites.EDITABLE)
    }
    fields: dict[str, Any] = {name: EditSite(leaf, jnp.zeros_like(leaf)) for name, leaf in zeros.items()}
    return Edit(**fields)
