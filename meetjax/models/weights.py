"""From the tensors of a checkpoint to the parameter tree: stacked, transposed to (in, out), cast and placed leaf by leaf.

File formats answer one question (`Checkpoint.read`: some rows and columns of one tensor); everything else happens here once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.models.sites import Site
from meetjax.types import Params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
Index = tuple[slice, ...]
Shardings = dict[str, Any] | Callable[[ModelConfig], dict[str, Any]]
"""Tree of NamedSharding shaped like `sites.shapes(config)`, or a function of the config that makes one."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: every tensor of `config` is there with its shape, and nothing else.

    `read(site, layer, index)` gives `tensor[index]` in the layout of the file, (out, in) for linear sites; `layer` is None
    outside the blocks. `sliced` tells that a part of a tensor costs only that part. `make_tokenizer` is called once, last.
    """

    name: str
    config: ModelConfig
    read: Callable[[Site, int | None, Index], np.ndarray]
    sliced: bool
    make_tokenizer: Callable[[], Any]


def transposed(site: Site) -> bool:
    """True where the file holds (out, in): the linear sites and the head."""
    return len(site.axes) == 2 and site.name != "embed"


def file_shape(config: ModelConfig, site: Site) -> tuple[int, ...]:
    """Shape of one tensor as Hugging Face and GGUF (read in row-major order) store it."""
    shape = sites.shape(config, site)
    return shape[::-1] if transposed(site) else shape


def _read_leaf(checkpoint: Checkpoint, site: Site, index: Index, dtype: np.dtype) -> np.ndarray:
    """`leaf[index]` in the layout of the tree, layer axis first for blocks; C-contiguous, one layer in memory besides the result."""

    def piece(layer: int | None, at: Index) -> np.ndarray:
        return checkpoint.read(site, layer, at[::-1]).T if transposed(site) else checkpoint.read(site, layer, at)

    shape = sites.shape(checkpoint.config, site)
    if site.name in sites.TOP:
        return np.ascontiguousarray(piece(None, index)).astype(dtype, copy=False)
    layers = range(*index[0].indices(checkpoint.config.layers))
    sizes = [len(range(*part.indices(size))) for part, size in zip(index[1:], shape, strict=True)]
    stacked = np.empty((len(layers), *sizes), dtype)
    for row, layer in enumerate(layers):
        stacked[row] = piece(layer, index[1:])
    return stacked


def _place_leaf(checkpoint: Checkpoint, site: Site, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    full = tuple(slice(0, size) for size in shape)
    if sharding is None:
        return jnp.asarray(_read_leaf(checkpoint, site, full, dtype))
    if not checkpoint.sliced:
        host = _read_leaf(checkpoint, site, full, dtype)
        return jax.make_array_from_callback(shape, sharding, lambda index: host[index])
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Called once a device: devices that hold the same part must not read it again.
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        if bounds not in read:
            read[bounds] = _read_leaf(checkpoint, site, tuple(slice(*b) for b in bounds), dtype)
        return read[bounds]

    return jax.make_array_from_callback(shape, sharding, part)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _leaf_paths(tree: Any, is_leaf: Callable[[Any], bool]) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def leaf_shardings(config: ModelConfig, mesh: Mesh | None, shardings: Shardings | None) -> dict[str, NamedSharding | None]:
    """Leaf path -> where it goes: None (default device), replicated over `mesh`, or as the tree says.

    Raises MeetjaxError for a tree of another structure, a leaf that is no NamedSharding or is on another mesh, or a sharded
    axis that does not divide.
    """
    shapes = _leaf_paths(sites.shapes(config), _is_shape)
    if shardings is None:
        return dict.fromkeys(shapes, None if mesh is None else NamedSharding(mesh, PartitionSpec()))
    given = _leaf_paths(shardings(config) if callable(shardings) else shardings, lambda node: not isinstance(node, dict))
    for path in sorted(shapes.keys() ^ given.keys()):
        what = "has no entry" if path in shapes else "is no leaf of this model"
        raise MeetjaxError(f"shardings: {path} {what}", fix="build the tree with the structure of sites.shapes(config)")
    for path, sharding in given.items():
        if not isinstance(sharding, NamedSharding):
            raise MeetjaxError(f"shardings: {path}", expected="a NamedSharding", found=type(sharding).__name__)
        if mesh is not None and sharding.mesh != mesh:
            raise MeetjaxError(f"shardings: {path} is on another mesh", expected=dict(mesh.shape), found=dict(sharding.mesh.shape))
        try:
            sharding.shard_shape(shapes[path])
        except ValueError:
            raise MeetjaxError(
                f"shardings: {path} of shape {shapes[path]} does not split evenly",
                found=sharding.spec,
                fix=f"choose a spec whose mesh axes divide it, mesh {dict(sharding.mesh.shape)}",
            ) from None
    return given


def _as_placed(path: str, leaf: jax.Array) -> Any:
    return leaf


def place(
    checkpoint: Checkpoint,
    dtype: str,
    mesh: Mesh | None = None,
    shardings: Shardings | None = None,
    each: Callable[[str, jax.Array], Any] = _as_placed,
) -> Params:
    """The parameter tree of `sites.shapes(config)` with every leaf cast to `dtype` and placed; one leaf at a time on the host.

    each: made of a leaf and its path as soon as it is placed and before the next one is read. Raises MeetjaxError for an unknown dtype
    or shardings that do not fit.
    """
    if dtype not in DTYPES:
        raise MeetjaxError("argument dtype", expected=" or ".join(DTYPES), found=dtype)
    config, where = checkpoint.config, leaf_shardings(checkpoint.config, mesh, shardings)
    shapes = sites.shapes(config)
    params: Params = {"blocks": {}}
    for name, site in sites.top_sites(config).items():
        params[name] = each(name, _place_leaf(checkpoint, site, shapes[name], DTYPES[dtype], where[name]))
    for name, site in sites.block_sites(config).items():
        path = f"blocks/{name}"
        params["blocks"][name] = each(path, _place_leaf(checkpoint, site, shapes["blocks"][name], DTYPES[dtype], where[path]))
    return params
