"""The real training and decoding steps, and their arguments as shapes with their places on a mesh: nothing is allocated."""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import dtypes
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meetjax.adapters.bank import KIND_OF, init_bank
from meetjax.adapters.tree import Bank, columns
from meetjax.generate.decode import Asked, first_token, next_token
from meetjax.generate.sampling import RowSampling
from meetjax.models.config import ModelConfig
from meetjax.models.quant import Quantize, quantized_shapes, quantized_shardings
from meetjax.plan.question import BASE_GROUPS, Question, Setting
from meetjax.train.optim import make_optimizer
from meetjax.train.sharding import base_shardings, batch_sharding, check_batch, replicated, state_shardings
from meetjax.train.step import init_state, make_step, partition
from meetjax.types import BATCH_AXES, Batch


class _AnyText:
    """Stands for a tokenizer: the length of a soft prompt does not depend on its text."""

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return [0]


def _placed(shapes: Any, shardings: Any) -> Any:
    """`shardings` may have one for a whole quantised leaf."""

    def place(where: NamedSharding, node: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), node)

    return jax.tree.map(place, shardings, shapes)


def _base(config: ModelConfig, mesh: Mesh, kind: str) -> Any:
    quantize: Any
    quantize, dtype = (kind, config.dtype) if kind in get_args(Quantize) else ("none", kind)
    shapes = quantized_shapes(config, quantize, dtype)
    return _placed(shapes, quantized_shardings(config, quantize, base_shardings(config, mesh)))


def _bank(question: Question, config: ModelConfig, params: Any) -> Bank:
    specs: Any = tuple(spec for spec in question.stage.trains if spec != "base")
    wide = max(question.stage.view.controls, 1)
    return jax.eval_shape(lambda params: init_bank(config, params, specs, _AnyText(), jax.random.key(0), wide), params) if specs else Bank()


def training(question: Question, setting: Setting, config: ModelConfig, mesh: Mesh) -> tuple[Any, tuple, dict[str, int]]:
    """(the jitted step, its arguments as shapes, bytes of one device by group)."""
    params, stage = _base(config, mesh, setting.base), question.stage
    bank = _bank(question, config, params)
    bank = _placed(bank, state_shardings(config, bank, mesh))
    named = tuple(KIND_OF[type(spec)] for spec in stage.trains if spec != "base")
    trainable, frozen = partition(params, bank, kinds=named, base="base" in stage.trains)
    tx = make_optimizer(stage.optim, 1000)
    state = jax.eval_shape(lambda trainable: init_state(trainable, tx), trainable)
    state = _placed(state, state_shardings(config, state, mesh))
    check_batch(question.batch, mesh, setting.microbatches)
    where, pairs = batch_sharding(mesh), stage.objective.form == "pair"
    answers = 2 if pairs else 1

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    shared = question.shared_prompt and pairs
    batch = Batch(
        array((question.batch, 1 if shared else answers, question.length), jnp.int32),
        array((question.batch, answers), jnp.int32),
        array((question.batch, answers), jnp.int32),
        array((question.batch,), jnp.float32),
        ref_logps=array((question.batch, answers), jnp.float32) if stage.objective.needs_reference else None,
        common=array((question.batch,), jnp.int32) if shared else None,
    )
    groups = _groups(params) | {"adapters": _bytes(bank), "optimiser": _bytes(state.opt_state), "batch": _bytes(batch)}
    return make_step(config, stage, tx, setting.microbatches), (state, frozen, batch), groups


def decoding(question: Question, setting: Setting, config: ModelConfig, mesh: Mesh) -> tuple[Any, tuple, dict[str, int]]:
    """The same for one token of every row against a cache of `length` text slots."""
    params, rows = _base(config, mesh, setting.base), question.batch
    bank = _bank(question, config, params)
    bank = _placed(bank, state_shardings(config, bank, mesh))
    check_batch(rows, mesh)
    where = batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    apart = _apart(params)
    sampling = RowSampling(*(array((rows,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int32)))
    gates = array((rows, columns(bank)), jnp.float32) if columns(bank) else None
    asked = Asked(
        sampling,
        bank if gates is not None else None,
        gates,
        array((rows,), jnp.float32) if question.dial else None,
        array((rows,), jnp.int32),
    )
    first, following = (getattr(jitted, "__wrapped__") for jitted in (first_token, next_token))  # noqa: B009
    new = min(256, question.length - 1)
    prompts = jax.ShapeDtypeStruct((rows, question.length - new), jnp.int32)
    going = jax.eval_shape(lambda *a: first(config, *a, new), apart, prompts, array((rows,), jnp.int32), asked)
    heads = "model" if config.kv_heads % mesh.shape["model"] == 0 else None

    def place(leaf: Any) -> NamedSharding:
        if leaf.ndim == 4:
            return NamedSharding(mesh, PartitionSpec(BATCH_AXES, heads))
        return where if leaf.ndim else replicated(mesh)

    going = _placed(going, jax.tree.map(place, going))
    groups = _groups(params) | {"adapters": _bytes(bank), "cache": _bytes(going)}
    return jax.jit(lambda *a: following(config, *a), donate_argnums=1), (apart, going, asked), groups


def _apart(params: Any) -> Any:
    """`decoder.unstack` of shapes with shardings."""

    def cut(leaf: Any) -> Any:
        where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)

    blocks = params["blocks"]
    block = jax.tree.map(cut, blocks)
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    return rest | {f"block_{i}": block for i in range(jax.tree.leaves(blocks)[0].shape[0])}


def _bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * dtypes.itemsize_bits(leaf.dtype) for leaf in leaves) // 8


def _groups(params: Any) -> dict[str, int]:
    of_attention = ("q", "k", "v", "o")
    blocks = params["blocks"]
    attention = {name: leaf for name, leaf in blocks.items() if name.removesuffix("_bias") in of_attention}
    norms = {name: leaf for name, leaf in blocks.items() if name.endswith("norm")} | {"norm": params["norm"]}
    rest = {name: leaf for name, leaf in blocks.items() if name not in attention and name not in norms}
    ends = {name: leaf for name, leaf in params.items() if name in ("embed", "head")}
    return dict(zip(BASE_GROUPS, map(_bytes, (ends, attention, rest, norms)), strict=True))
