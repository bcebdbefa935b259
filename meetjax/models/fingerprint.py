"""The identity of a base: what an adapter was trained on, whatever its dtype and wherever it is sharded."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.types import Array, Params

FIELDS = ("vocab", "width", "hidden", "layers", "heads", "kv_heads", "head_width", "tied_head", "biases")
SAMPLES = 256


def _positions(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """256 evenly strided positions, one index an axis: a flat index overflows int32 for leaves of large models."""
    flat = np.arange(SAMPLES, dtype=np.int64) * math.prod(shape) // SAMPLES
    return tuple(axis.astype(np.int32) for axis in np.unravel_index(flat, shape))


def file_digest(path: Path) -> dict[str, str]:
    """Size and SHA-256 of 256 evenly spread pieces of 64 bytes of every file of a model, by name: what hosts can compare before
    any of them reads its part of the weights.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".jinja")) if path.is_dir() else [path]
    found = {}
    for file in files:
        size, digest = file.stat().st_size, hashlib.sha256()
        with open(file, "rb") as content:
            for place in range(SAMPLES):
                content.seek(place * max(size - 64, 0) // (SAMPLES - 1))
                digest.update(content.read(64))
        found[file.name] = f"{size} bytes, {digest.hexdigest()[:12]}"
    return found


@functools.partial(jax.jit, static_argnames="mesh")
def gather_samples(leaves: dict[str, Array], positions: dict[str, tuple[Array, ...]], mesh: Mesh | None) -> dict[str, Array]:
    """bfloat16[256] of every leaf, gathered on the devices that hold them; on a mesh replicated, so that every process can read them."""
    picked = {path: leaf[positions[path]].astype(jnp.bfloat16) for path, leaf in leaves.items()}
    return picked if mesh is None else jax.lax.with_sharding_constraint(picked, NamedSharding(mesh, PartitionSpec()))


def fingerprint(config: ModelConfig, params: Params) -> str:
    """SHA-256 (64 hex digits) of the shape fields of `config` and, for each leaf by path, its shape and 256 bfloat16 samples.

    Unchanged by a cast between float32 and bfloat16 and by resharding. `params` has stacked blocks. Raises MeetjaxError for a
    tree that is not that of `config`.
    """
    digest = hashlib.sha256(json.dumps({field: getattr(config, field) for field in FIELDS}, sort_keys=True).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    shapes, _ = jax.tree_util.tree_flatten_with_path(sites.shapes(config), is_leaf=lambda node: isinstance(node, tuple))
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): shape for path, shape in shapes}
    for path in sorted(shapes.keys() | leaves.keys()):
        found = tuple(leaves[path].shape) if path in leaves else None
        if found != shapes.get(path):
            raise MeetjaxError(f"params: leaf {path}", expected=shapes.get(path, "no such leaf"), found=found or "no such leaf")
    meshes = [leaf.sharding.mesh for leaf in leaves.values() if isinstance(getattr(leaf, "sharding", None), NamedSharding)]
    positions = {path: _positions(shape) for path, shape in shapes.items()}
    picked = gather_samples(leaves, positions, meshes[0] if meshes else None)
    for path, shape in sorted(shapes.items()):
        digest.update(f"{path}{shape}".encode() + np.asarray(picked[path]).view(np.uint16).astype("<u2").tobytes())
    return digest.hexdigest()
