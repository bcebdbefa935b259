"""Which setting to compile first, and which of its neighbours would be quicker."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from meetjax.models.attention import choose_attention
from meetjax.plan.chips import open_topology
from meetjax.plan.compiler import ask
from meetjax.plan.question import BASES, Answer, Question, Setting
from meetjax.train.sharding import preset


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
    length = question.length + question.soft
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
    for base in BASES[BASES.index("int8") if "base" not in question.stage.trains else BASES.index("bfloat16") :]:
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
