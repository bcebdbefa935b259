"""`meetjax plan`: compiles the real training or decoding step for TPUs that are not there, and says whether it fits and what it costs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meetjax.adapters.bank import KIND_OF, init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.tree import Bank, columns
from meetjax.chips import open_topology
from meetjax.collectives import count_traffic
from meetjax.errors import MeetjaxError
from meetjax.generate.decode import Asked, first_token, next_token
from meetjax.generate.sampling import RowSampling
from meetjax.models import sites
from meetjax.models.attention import choose_attention
from meetjax.models.config import ModelConfig
from meetjax.objectives.head import CHUNK
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.flops import step_flops
from meetjax.train.optim import make_optimizer
from meetjax.train.sharding import base_shardings, batch_sharding, check_batch, make_mesh, preset, replicated, state_shardings
from meetjax.train.stage import Stage
from meetjax.train.step import init_state, make_step, partition
from meetjax.types import BATCH_AXES, Batch

_TRAINED: dict[str, Any] = {"lora": LoraSpec(), "red": EditSpec(), "clm": IdentitySpec(), "prompt": PromptSpec(), "full": "base"}
RECIPES = {
    f"{name}-{loss}": Stage(trains=(spec,), objective=objective)
    for name, spec in _TRAINED.items()
    for loss, objective in (("dpo", Dpo()), ("sft", Sft()))
}
"""Stages by name, with the defaults of their parts; `meetjax plan` takes a recipe's file too."""
BASES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a plan is free to choose. mesh: (data, fsdp, model); base: dtype of frozen weights; the rest as in `ModelConfig`, `Train`."""

    mesh: tuple[int, int, int]
    remat: str
    attention: str
    base: str = "bfloat16"
    microbatches: int = 1
    residual: str = "sequence"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to run. batch: prompts a step, or rows that decode; length: tokens of a row, of a prompt and one answer or, with
    `shared_prompt`, of a prompt and all its answers; dial: rows decode with the logit dial, so twice.
    """

    model: str
    config: ModelConfig
    recipe: str
    stage: Stage
    topology: str
    batch: int
    length: int
    what: Literal["train", "decode"] = "train"
    slices: int = 1
    shared_prompt: bool = False
    dial: bool = True

    @property
    def rows(self) -> int:
        """Rows of a step."""
        paired = self.stage.objective.form == "pair" and not self.shared_prompt
        return self.batch * (2 if self.what == "train" and paired else 1)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a step needs of one device. Bytes and seconds; `over`: bytes missing, 0 where it fits; groups: bytes of arguments by what they
    are; flops: of a whole step over all devices, counted by hand; moved: bytes sent by kind of collective; seconds: the least that
    products, memory and links take, each alone; bound: the longest of these; largest: numbers in the largest array gathered on a device.
    """

    setting: Setting
    fits: bool
    over: float
    arguments: int
    temporaries: int
    output: int
    groups: dict[str, int]
    flops: float
    moved: dict[str, float]
    seconds: dict[str, float]
    bound: str
    largest: int
    compile_s: float


def ask(question: Question, setting: Setting) -> Answer:
    """Compiles one setting; a step that does not fit is an answer, too. Raises MeetjaxError for a topology, mesh, batch or dtype that
    cannot be.
    """
    devices, chip = open_topology(question.topology, question.slices)
    mesh = make_mesh(setting.mesh, devices)
    if mesh.size < len(devices):
        expected = f"a product of {len(devices)}, the devices of {question.topology}"
        raise MeetjaxError("plan: mesh", expected=expected, found=setting.mesh, fix="use all of them or a smaller topology")
    if setting.base not in BASES:
        raise MeetjaxError("plan: base", expected=" or ".join(BASES), found=setting.base)
    how = {"remat": setting.remat, "attention": setting.attention, "residual": setting.residual, "dtype": "bfloat16"}
    config = dataclasses.replace(question.config, **how)
    begun = time.monotonic()
    with jax.set_mesh(mesh):
        make = _train if question.what == "train" else _decode
        step, arguments, groups = make(question, setting, config, mesh)
        try:
            made = step.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM])", str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
                raise
            used, limit = (float(needed[i]) * {"G": 2**30, "M": 2**20}[needed[i + 1]] for i in (1, 3))
            return Answer(
                setting, False, used - limit, sum(groups.values()), int(used) - sum(groups.values()), 0, groups, 0.0, {}, {}, "memory", 0,
                time.monotonic() - begun,
            )  # fmt: skip
    memory = made.memory_analysis()
    rows = question.rows // setting.microbatches // math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    traffic = count_traffic(made.as_text(), unknown=max(1, rows * question.length // 2 // CHUNK))
    flops = _flops(question, config)
    seconds = {
        "products": flops / mesh.size / (chip.peak_flops / chip.devices),
        "memory": _least_bytes(question, setting, groups, memory, mesh) / (chip.memory_bandwidth / chip.devices),
        "links": sum(traffic.bytes.values()) / (chip.link_bandwidth / chip.devices),
    }
    return Answer(
        setting, True, 0.0, memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes, groups, flops,
        traffic.bytes, seconds, max(seconds, key=lambda name: seconds[name]), traffic.largest, time.monotonic() - begun,
    )  # fmt: skip


def first_setting(question: Question, **chosen: Any) -> Setting:
    """The setting to start from, `chosen` fields as they are and the others by rule: the preset fsdp-tensor (multi-slice over several
    slices), the residual stream kept alone, splash where it can be, as many micro-batches as the estimate of `_kept` asks for.
    """
    devices, chip = open_topology(question.topology, question.slices)
    if question.what == "decode":
        model = math.gcd(len(devices), question.config.kv_heads)
        mesh: tuple[int, int, int] = (1, len(devices) // model, model)
    else:
        mesh = preset("multi-slice" if question.slices > 1 else "fsdp-tensor", len(devices), question.slices)
    mesh = chosen.pop("mesh", None) or mesh
    length = question.length + _soft(question)
    config = dataclasses.replace(question.config, dtype="bfloat16")
    attention = choose_attention(config, chosen.pop("attention", None) or "auto", "tpu", length)[0]
    setting = Setting(mesh, "full", attention) if question.what == "train" else Setting(mesh, "none", "xla")
    setting = dataclasses.replace(setting, **{name: value for name, value in chosen.items() if value})
    if question.what == "train" and not chosen.get("microbatches"):
        budget, ways = chip.memory_bytes / chip.devices / 10, math.prod(mesh[:2])
        while _kept(question, setting) > budget and question.batch % (setting.microbatches * 2 * ways) == 0:
            setting = dataclasses.replace(setting, microbatches=setting.microbatches * 2)
    return setting


def _kept(question: Question, setting: Setting) -> float:
    """About how many bytes of activations a device holds: the stream of every layer, and six arrays of one."""
    rows = question.rows / setting.microbatches / math.prod(setting.mesh[:2])
    return rows * question.length * question.config.width * 2 * (question.config.layers / setting.mesh[2] + 6)


def neighbours(question: Question, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """(what changes, the setting with that one change), those that can be."""
    data, fsdp, model = setting.mesh
    change: Callable[..., Setting] = lambda **fields: dataclasses.replace(setting, **fields)  # noqa: E731
    ways = data * fsdp
    if question.what == "train":
        if model > 1 and question.batch % (ways * 2 * setting.microbatches) == 0:
            yield f"mesh {data} x {fsdp * 2} x {model // 2}", change(mesh=(data, fsdp * 2, model // 2))
        if fsdp % 2 == 0:
            yield f"mesh {data} x {fsdp // 2} x {model * 2}", change(mesh=(data, fsdp // 2, model * 2))
        yield ("remat dots", change(remat="dots")) if setting.remat == "full" else ("remat full", change(remat="full"))
        if question.batch % (ways * setting.microbatches * 2) == 0:
            yield f"{setting.microbatches * 2} microbatches", change(microbatches=setting.microbatches * 2)
        if setting.microbatches % 2 == 0:
            yield f"{setting.microbatches // 2} microbatches", change(microbatches=setting.microbatches // 2)
        if setting.attention == "xla" and choose_attention(question.config, "auto", "tpu", question.length)[0] == "splash":
            yield "attention splash", change(attention="splash")
        if setting.residual != "sequence":
            yield "residual sequence", change(residual="sequence")
    elif fsdp % 2 == 0:
        yield f"mesh {data * 2} x {fsdp // 2} x {model}", change(mesh=(data * 2, fsdp // 2, model))
    for base in BASES:
        if BASES.index(base) < BASES.index(setting.base):
            yield f"base {base}", change(base=base)


def suggest(question: Question, answer: Answer, told: Callable[[str], None] = lambda _: None) -> tuple[str, Answer] | None:
    """(what to change, its answer) of the neighbour with the shortest bound of those that fit, if it beats `answer` by a twentieth."""
    best: tuple[str, Answer] | None = None
    for name, setting in neighbours(question, answer.setting):
        told(name)
        found = ask(question, setting)
        if found.fits and _time(found) < (0.95 if best is None else 1) * _time(best[1] if best else answer):
            best = name, found
    return best


def _time(answer: Answer) -> float:
    return answer.seconds[answer.bound] if answer.fits else math.inf


class _AnyText:
    """Stands for a tokenizer: the length of a soft prompt does not depend on its text."""

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return [0]


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)


def _base(config: ModelConfig, mesh: Mesh, dtype: str) -> Any:
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), sites.shapes(config), is_leaf=lambda node: isinstance(node, tuple)
    )
    return _placed(shapes, base_shardings(config, mesh))


def _bank(question: Question, config: ModelConfig, params: Any) -> Bank:
    specs: Any = tuple(spec for spec in question.stage.trains if spec != "base")
    wide = max(question.stage.view.controls, 1)
    return jax.eval_shape(lambda params: init_bank(config, params, specs, _AnyText(), jax.random.key(0), wide), params) if specs else Bank()


def _soft(question: Question) -> int:
    return sum(spec.length * max(question.stage.view.controls, 1) for spec in question.stage.trains if isinstance(spec, PromptSpec))


def _train(question: Question, setting: Setting, config: ModelConfig, mesh: Mesh) -> tuple[Any, tuple, dict[str, int]]:
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


def _decode(question: Question, setting: Setting, config: ModelConfig, mesh: Mesh) -> tuple[Any, tuple, dict[str, int]]:
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
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _groups(params: Any) -> dict[str, int]:
    of_attention = ("q", "k", "v", "o")
    blocks = params["blocks"]
    attention = {name: leaf for name, leaf in blocks.items() if name.removesuffix("_bias") in of_attention}
    norms = {name: leaf for name, leaf in blocks.items() if name.endswith("norm")} | {"norm": params["norm"]}
    rest = {name: leaf for name, leaf in blocks.items() if name not in attention and name not in norms}
    ends = {name: leaf for name, leaf in params.items() if name in ("embed", "head")}
    return {"embedding and head": _bytes(ends), "attention": _bytes(attention), "feed-forward": _bytes(rest), "norms": _bytes(norms)}


def _flops(question: Question, config: ModelConfig) -> float:
    """Rows are full; half of each is answer. A decoding step sees all slots."""
    rows, length = question.rows, question.length + _soft(question)
    if question.what == "decode":
        rows *= 2 if question.dial else 1
        weights = config.layers * sum(math.prod(sites.shape(config, site)) for site in sites.block_sites(config).values() if site.linear)
        attention = 4 * length * config.layers * config.heads * config.head_width
        return rows * (2 * weights + attention) + 2 * question.rows * config.vocab * config.width
    return step_flops(
        config, rows * length, rows * length * (length + 1) // 2, rows * question.length // 2, "base" in question.stage.trains
    )


def _least_bytes(question: Question, setting: Setting, groups: dict[str, int], memory: Any, mesh: Mesh) -> float:
    """Bytes that a device reads or writes at least: arguments and results once, temporaries twice, and in training every layer's weights
    for the forward pass, for its repetition and for the gradient of every micro-batch.
    """
    least = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    if question.what == "train":
        weights = groups["attention"] + groups["feed-forward"]
        least += weights * mesh.shape["fsdp"] * (2 if setting.remat == "none" else 3) * setting.microbatches
    return least
