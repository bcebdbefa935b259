"""One setting of a step, compiled for TPUs that are not there: whether it fits and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.objectives.head import CHUNK
from meetjax.plan.arguments import decoding, training
from meetjax.plan.chips import open_topology
from meetjax.plan.collectives import count_traffic
from meetjax.plan.question import BASES, Answer, Question, Setting
from meetjax.train.flops import step_flops
from meetjax.train.sharding import make_mesh
from meetjax.types import BATCH_AXES


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
    pinned = setting.residual != "free"
    how = {"remat": setting.remat, "attention": setting.attention, "dtype": "bfloat16"}
    config = dataclasses.replace(question.config, **how | ({"residual": setting.residual} if pinned else {}))
    begun = time.monotonic()
    # Without a mesh to name, nothing in the model holds an activation; arguments have their places all the same.
    with nothing_kept(), jax.set_mesh(mesh) if pinned else contextlib.nullcontext():
        make = training if question.what == "train" else decoding
        step, arguments, groups = make(question, setting, config, mesh)
        try:
            made = step.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            found = shortage(str(error))
            if found is None:
                raise
            held, (used, limit, alone) = sum(groups.values()), found
            temporaries = int(used if alone else used - held)
            over = temporaries + held - limit
            return Answer(setting, False, over, held, temporaries, 0, groups, 0.0, {}, {}, "memory", 0, time.monotonic() - begun)
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


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """JAX would keep a program of a TPU that is not there in its compile cache, and then fail to read it."""
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, math.inf)
    try:
        yield
    finally:
        jax.config.update(least, before)


def shortage(message: str) -> tuple[float, float, bool] | None:
    """(bytes used, bytes there are, whether used are temporaries alone) of the compiler's error; None of another error."""
    for alone, words in ((False, r"Used {0} of {0}"), (True, r"HLO temporaries \({0}\) exceeds available HBM \({0}\)")):
        numbers = re.search(words.format(r"([\d.]+)([GM])"), message)
        if "RESOURCE_EXHAUSTED" in message and numbers is not None:
            used, limit = (float(numbers[i]) * {"G": 2**30, "M": 2**20}[numbers[i + 1]] for i in (1, 3))
            return used, limit, alone
    return None


def _flops(question: Question, config: ModelConfig) -> float:
    """Rows are full; half of each is answer. A decoding step sees all slots."""
    rows, length = question.rows, question.length + question.soft
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
