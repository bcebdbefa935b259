"""What is asked of `meetjax plan`, what it is free to choose, and what it answers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.models.config import ModelConfig
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.stage import Stage

_TRAINED: dict[str, Any] = {"lora": LoraSpec(), "red": EditSpec(), "clm": IdentitySpec(), "prompt": PromptSpec(), "full": "base"}
RECIPES = {
    f"{name}-{loss}": Stage(trains=(spec,), objective=objective)
    for name, spec in _TRAINED.items()
    for loss, objective in (("dpo", Dpo()), ("sft", Sft()))
}
"""Stages by name, with the defaults of their parts; `meetjax plan` takes a recipe's file too."""
BASES = ("int4", "int8", "bfloat16", "float32")
BASE_GROUPS = ("embedding and head", "attention", "feed-forward", "norms")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a plan is free to choose. mesh: (data, fsdp, model); base: dtype of frozen weights; residual: as in `ModelConfig`, or "free",
    where no activation is held to any place, to see what that would cost; the rest as in `ModelConfig`, `Train`.
    """

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

    @property
    def soft(self) -> int:
        """Positions of a row that are soft prompts."""
        prompts = (spec for spec in self.stage.trains if isinstance(spec, PromptSpec))
        return sum(spec.length * max(self.stage.view.controls, 1) for spec in prompts)


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

    @property
    def base(self) -> int:
        """Bytes of the model's own weights."""
        return sum(size for name, size in self.groups.items() if name in BASE_GROUPS)
