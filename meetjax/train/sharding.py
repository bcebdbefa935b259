"""Where every leaf lives: one table from logical axes to mesh axes, and the meshes by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meetjax.adapters.tree import Bank, kinds
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.train.hosts import share_of
from meetjax.types import BATCH_AXES, Batch

MESH_AXES = ("data", "fsdp", "model")
RULES = {
    "layers": None, "embed": "fsdp", "heads": "model", "kv": "model", "ffn": "model", "vocab": "model",
    "entries": None, "rank": None, "prompt": None,
}  # fmt: skip
"""Logical axis of a leaf -> mesh axis. An adapter's leaf follows the site it acts on; what all devices need whole (ranks, gate columns,
soft prompts' places) is never split. `data` splits the batch alone, so that slices, between which links are slow, exchange gradients only.
"""
Preset = Literal["single", "fsdp", "fsdp-tensor", "multi-slice"]
MOST_TENSOR = 16
"""Devices that share one layer's heads at most: beyond, products are too narrow for a matrix unit."""


def preset(name: str, devices: int, slices: int = 1) -> tuple[int, int, int]:
    """(data, fsdp, model) of a preset on a number of devices.

    single: one device; fsdp: weights and batch over all; fsdp-tensor: `model` the largest power of two up to the square root of the
    devices and `MOST_TENSOR`; multi-slice: fsdp-tensor in each of `slices` (2 at least), copies of the weights in each, `data` between
    them. Raises MeetjaxError for another name and for devices that do not divide.
    """
    if name not in get_args(Preset):
        raise MeetjaxError("recipe: train.mesh", expected=" or ".join(get_args(Preset)), found=name)
    if name == "single":
        return 1, 1, 1
    if name == "fsdp":
        return 1, devices, 1
    slices = max(slices, 2) if name == "multi-slice" else 1
    if devices % slices:
        raise MeetjaxError("recipe: train.mesh", expected=f"a multiple of {slices} slices", found=f"{devices} devices")
    each, model = devices // slices, 1
    while model * 2 <= MOST_TENSOR and (model * 2) ** 2 <= each and each % (model * 2) == 0:
        model *= 2
    return slices, each // model, model


def make_mesh(shape: tuple[int, int, int] | str, devices: list[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, model), given or by the name of a preset, with Auto axes over the first devices.

    TPU devices are placed by their links: slices apart along `data`, neighbours on the axes behind. Raises MeetjaxError when there are
    too few.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if isinstance(shape, str):
        shape = preset(shape, len(devices), slices)
    count = math.prod(shape)
    if len(shape) != len(MESH_AXES) or min(shape) < 1 or count > len(devices):
        raise MeetjaxError(
            "recipe: train.mesh",
            expected=f"(data, fsdp, model) with a product of 1 to {len(devices)} devices",
            found=shape,
            fix="change train.mesh",
        )
    if slices > 1 and (count != len(devices) or shape[0] % slices):
        expected = f"all {len(devices)} devices, data a multiple of the {slices} slices"
        raise MeetjaxError("recipe: train.mesh", expected=expected, found=shape, fix="use multi-slice")
    return Mesh(_placed(shape, devices[:count], slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _placed(shape: tuple[int, int, int], devices: list[Any], slices: int) -> np.ndarray:
    if devices[0].platform != "tpu" or any(device.core_on_chip for device in devices):
        return np.asarray(devices).reshape(shape)  # in the order given, as also where a chip is two devices
    from jax.experimental import mesh_utils

    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _shard(config: ModelConfig, mesh: Any, path: str, axes: tuple[str, ...]) -> NamedSharding:
    """The sharding of a leaf with these logical axes; an axis that does not divide is left whole, and heads are never cut."""

    def name(axis: str) -> str | None:
        if axis not in RULES:
            raise MeetjaxError(f"sharding of {path}: logical axis {axis!r}", expected="one of " + ", ".join(RULES), found="no rule for it")
        units = {"heads": config.heads, "kv": config.kv_heads}.get(axis, config.sizes.get(axis, 1))
        rule = RULES[axis]
        return rule if rule and units % mesh.shape[rule] == 0 else None

    return NamedSharding(mesh, PartitionSpec(*map(name, axes)))


def base_shardings(config: ModelConfig, mesh: Any) -> dict[str, Any]:
    """NamedSharding of every base leaf."""
    return jax.tree.map(lambda axes: _shard(config, mesh, "base", axes), sites.logical_axes(config), is_leaf=_is_axes)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def adapter_axes(bank: Bank) -> Bank:
    """The bank with the logical axes of each leaf in its place. Raises MeetjaxError for a kind that has no rule."""
    made = {}
    for kind in kinds(bank):
        if kind not in _AXES:
            raise MeetjaxError(f"sharding of {kind}", expected="one of " + ", ".join(_AXES), found="no rule for it")
        tree = getattr(bank, kind)
        made[kind] = jax.tree_util.tree_map_with_path(lambda path, _, kind=kind: _AXES[kind](*_names(path)), tree)
    return Bank(**made)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "name", getattr(key, "key", key))) for key in path]


_AXES: dict[str, Callable[..., tuple[str, ...]]] = {
    "prompt": lambda *_: ("entries", "prompt", "embed"),
    "lora": lambda site, side: (
        "layers",
        "entries",
        *((sites.BLOCK[site].axes[0], "rank") if side == "a" else ("rank", sites.BLOCK[site].axes[1])),
    ),
    "edit": lambda site, _: ("layers", "entries", sites.BLOCK[site].axes[-1]),
    "identity": lambda _, site: ("layers", "entries", *sites.BLOCK[site].axes),
    "reward": lambda *_: ("entries", "embed"),
}
"""Kind -> logical axes of a leaf by its path inside the kind's tree."""


def adapter_shardings(config: ModelConfig, bank: Bank, mesh: Any) -> Bank:
    """NamedSharding of every leaf of a bank (or of its shapes)."""
    return jax.tree.map(lambda axes: _shard(config, mesh, "adapters", axes), adapter_axes(bank), is_leaf=_is_axes)


def state_shardings(config: ModelConfig, tree: Any, mesh: Any) -> Any:
    """NamedSharding of every leaf of whatever is built of banks and base trees: parts, optimiser moments, a whole `State`.

    Numbers without axes are replicated. Raises MeetjaxError for any other leaf: nothing is placed by default.
    """
    base, names = base_shardings(config, mesh), set(sites.shapes(config))

    def is_tree(node: Any) -> bool:
        return isinstance(node, Bank) or (isinstance(node, dict) and set(node) == names)

    def one(path: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, Bank):
            return adapter_shardings(config, node, mesh)
        if isinstance(node, dict):
            return base
        if getattr(node, "ndim", None) != 0:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise MeetjaxError(f"sharding of {where}", expected="a leaf of the base, of a bank or of its optimiser", found=node)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_tree)


def keep_placed(config: ModelConfig, tree: Any) -> Any:
    """Inside a program: the tree, placed by the table on the mesh that the program runs on, so that a step returns what it was given."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(MESH_AXES) - set(mesh.axis_names):
        return tree
    return jax.lax.with_sharding_constraint(tree, state_shardings(config, tree, mesh))


def replicated(mesh: Any) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, mesh: Mesh, microbatches: int = 0) -> None:
    """Raises MeetjaxError for a batch that does not divide over the mesh, each micro-batch of it alike (0: whatever the rule gives)."""
    ways, microbatches = math.prod(mesh.shape[axis] for axis in BATCH_AXES), max(1, microbatches)
    if rows % (ways * microbatches):
        parts = "" if microbatches == 1 else f" x {microbatches} microbatches"
        expected = f"a multiple of data x fsdp{parts} = {ways * microbatches}"
        raise MeetjaxError("recipe: train.batch_size", expected=expected, found=rows)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the mesh, rows split over the batch axes; of several hosts each gives its own rows (`hosts.share_of`).

    Raises MeetjaxError when they do not divide.
    """
    rows = batch.tokens.shape[0] * share_of(mesh)[1]
    check_batch(rows, mesh)
    where = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, where)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf, (rows, *leaf.shape[1:])), batch)
