"""Where every leaf lives: one table from logical axes to mesh axes."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.train.hosts import share_of
from meetjax.types import BATCH_AXES, Batch

MESH_AXES = ("data", "fsdp", "model")
RULES = {"layers": None, "embed": "fsdp", "heads": "model", "kv": "model", "ffn": "model", "vocab": "model"}
"""Logical axis of a base leaf -> mesh axis. Adapters are replicated: they are small, and their rank is never split."""


def make_mesh(shape: tuple[int, int, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, model) with Auto axes over the first devices. Raises MeetjaxError when there are too few."""
    devices = jax.devices() if devices is None else devices
    count = math.prod(shape)
    if len(shape) != len(MESH_AXES) or min(shape) < 1 or count > len(devices):
        raise MeetjaxError(
            "recipe: train.mesh",
            expected=f"(data, fsdp, model) with a product of 1 to {len(devices)} devices",
            found=shape,
            fix="change train.mesh",
        )
    return Mesh(np.asarray(devices[:count]).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def base_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding of every base leaf; an axis that does not divide is left whole."""

    def one(axes: tuple[str, ...]) -> NamedSharding:
        names = [RULES[axis] for axis in axes]
        sizes = [config.sizes[axis] for axis in axes]
        fits = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, sizes, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(one, sites.logical_axes(config), is_leaf=lambda node: isinstance(node, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it: adapters, their optimiser state, the step counter."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, mesh: Mesh) -> None:
    """Raises MeetjaxError for a batch that does not divide over the mesh."""
    if rows % (ways := math.prod(mesh.shape[axis] for axis in BATCH_AXES)):
        raise MeetjaxError("recipe: train.batch_size", expected=f"a multiple of data x fsdp = {ways}", found=rows)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the mesh, rows split over the batch axes; of several hosts each gives its own rows (`hosts.share_of`).

    Raises MeetjaxError when they do not divide.
    """
    rows = batch.tokens.shape[0] * share_of(mesh)[1]
    check_batch(rows, mesh)
    where = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    if jax.process_count() == 1:
        return jax.device_put(batch, where)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf, (rows, *leaf.shape[1:])), batch)
