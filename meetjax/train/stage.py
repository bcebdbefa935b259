"""A recipe: which model, which data, and a list of stages that say what trains, under which loss, and how."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meetjax.adapters.bank import KIND_OF, Spec
from meetjax.adapters.lora import LoraSpec
from meetjax.errors import MeetjaxError
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW; `warmup` is a fraction of the stage's steps, `clip` the global norm of the trainable gradient (0: none)."""

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class Stage:
    """trains: adapter specs, or "base" for the model's own weights; the rest stays frozen."""

    trains: tuple[Spec | Literal["base"], ...] = (LoraSpec(),)
    objective: Dpo | Sft = Dpo()
    optim: Optim = Optim()


@dataclasses.dataclass(frozen=True)
class Data:
    """path: a file or a hub id; held_out: prompts kept for evaluation; lengths in tokens."""

    path: str = ""
    split: str | None = None
    limit: int | None = None
    held_out: int = 100
    max_length: int = 512
    template: Literal["auto", "chat", "none"] = "auto"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Train:
    """steps and batch_size (prompts a step, all devices together) hold for each stage; mesh is (data, fsdp, model)."""

    steps: int = 200
    batch_size: int = 8
    microbatches: int = 1
    save_every: int = 50
    seed: int = 0
    mesh: tuple[int, int, int] = (1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a run needs; stored resolved beside every checkpoint and adapter."""

    name: str
    model: str = "smollm2-135m-instruct"
    data: Data = Data()
    train: Train = Train()
    stages: tuple[Stage, ...] = (Stage(),)
    out: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"


def check_recipe(recipe: Recipe) -> None:
    """Raises MeetjaxError for a recipe that cannot run, naming the field."""
    if not recipe.stages:
        raise MeetjaxError("recipe: stages", expected="at least one", found="none")
    for i, stage in enumerate(recipe.stages):
        if not stage.trains:
            raise MeetjaxError(
                f"recipe: stages.{i}.trains: zero trainable leaves", expected="base or some of " + ", ".join(KIND_OF.values()), found="()"
            )
    for field, value, low in (
        ("train.steps", recipe.train.steps, 1),
        ("train.batch_size", recipe.train.batch_size, 1),
        ("train.microbatches", recipe.train.microbatches, 1),
        ("train.save_every", recipe.train.save_every, 1),
        ("data.held_out", recipe.data.held_out, 0),
        ("data.max_length", recipe.data.max_length, 8),
    ):
        if value < low:
            raise MeetjaxError(f"recipe: {field}", expected=f">= {low}", found=value)
    if not recipe.data.path:
        raise MeetjaxError("recipe: data.path is empty", fix="give a file or hub id: --set data.path=FILE")
    if recipe.train.batch_size % recipe.train.microbatches:
        expected = f"a divisor of train.batch_size = {recipe.train.batch_size}"
        raise MeetjaxError("recipe: train.microbatches", expected=expected, found=recipe.train.microbatches)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, with the type of every variant named."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"type": type(value).__name__} | fields
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(recipe)


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Applies `field.path=value` settings; tuples are indexed (`stages.0.optim.learning_rate=1e-3`).

    Raises MeetjaxError for an unknown field, listing those that exist, or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise MeetjaxError(f"--set {assignment}", expected="field=value", found="no =")
        recipe = _replaced(recipe, path.split("."), text, path)
    return recipe


def _replaced(node: Any, path: list[str], text: str, whole: str) -> Any:
    if not path:
        return _parsed(node, text, whole)
    head, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not head.isdigit() or int(head) >= len(node):
            raise MeetjaxError(f"--set {whole}: index {head}", expected=f"0 to {len(node) - 1}", found=head)
        return tuple(_replaced(item, rest, text, whole) if i == int(head) else item for i, item in enumerate(node))
    names = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    if head not in names:
        raise MeetjaxError(f"--set {whole}: field {head}", expected="one of " + (", ".join(names) or "no further field"), found=head)
    try:
        return dataclasses.replace(node, **{head: _replaced(getattr(node, head), rest, text, whole)})
    except TypeError as error:
        raise MeetjaxError(f"--set {whole}", found=error) from None


def _parsed(old: Any, text: str, whole: str) -> Any:
    """`text` as a value of the type of `old`; None takes integers where they parse, else strings."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, tuple):
            items = [item for item in text.strip("()[] ").split(",") if item.strip()]
            return tuple(_parsed(old[0] if old else "", item.strip(), whole) for item in items)
        if isinstance(old, str):
            return text
        if old is None:
            return None if text.lower() == "none" else int(text) if text.lstrip("-").isdigit() else text
        return type(old)(text)
    except (KeyError, ValueError, TypeError):
        raise MeetjaxError(f"--set {whole}: value", expected=f"a {type(old).__name__}", found=repr(text)) from None
