"""A recipe: which model, which data, and a list of stages that say what trains, under which loss, and how."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

from meetjax.adapters.bank import KIND_OF, Spec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.tree import MERGEABLE
from meetjax.errors import MeetjaxError
from meetjax.models.quant import Quantize
from meetjax.objectives.bounds import bounds_of
from meetjax.objectives.preference import Dpo
from meetjax.objectives.table import OBJECTIVES
from meetjax.train.sharding import Preset
from meetjax.types import Array


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW; `warmup` is a fraction of the stage's steps, `clip` the norm of each gate column's gradient and of the base's (0: none).

    base_learning_rate: that of the base where it trains beside adapters; 0 is the same for both.
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    base_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.999


@runtime_checkable
class Objective(Protocol):
    """What `Dpo` and `Sft` are and a new loss has to be: a frozen dataclass called as objective(logps [B, C], batch).

    It returns (summed loss, normaliser, summed metrics with their normalisers). form: the records it reads, "pair", "completion"
    or "labelled"; needs_reference: whether it reads `batch.ref_logps`. A labelled one also says `partners`: whether each prompt
    has a second answer, one to another prompt. An objective with numbers that belong to the whole batch and not to a micro-batch
    (KTO's z0) has a method pool(logps, batch) -> (sum, weight) and is called as objective(logps, batch, pooled), where pooled is
    sum / weight over the whole batch, without a gradient. One that asks for an answer in several ways names them in `asks`
    (`data.convert.instructed`); one with `reads_tokens` is called with the log-probability of each token; one with `reads_states`
    is called with the hidden states of a student and a teacher (`Rahf`), and one with `reads_rewards` with the rewards [B, C] of the
    answers (`BradleyTerry`). Fields made by `objectives.bounds` are checked with the recipe.
    """

    form: ClassVar[Any]  # Any, because a class variable is mutable and so admits no narrower type in an implementation
    needs_reference: ClassVar[bool]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Array, dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class View:
    """Which rows a stage sees, and what it is told about their class (0 bad, 1 good).

    controls: gate columns of the adapters that the stage makes, one a class of answers (MEET, Xue et al. 2023, arXiv 2310.00819);
    0: one adapter for all rows. gates: a row's gates by its class, () for one-hot; rows without a class take the only one given.
    keep: classes of the answers used, () for all. instructions: texts by class, bad first, for objectives that ask for an answer
    in several ways (`asks`). markers: text between prompt and answer by class, not learned (Liu et al. 2023,
    arXiv 2302.02676). goal: how a prompt asks for an answer of a score, with {score:g} in it: of two scored answers each is then
    preferred under its own (RA-DPO, Zhang et al. 2024, arXiv 2410.08067), and held-out prompts ask for the highest.
    """

    controls: int = 0
    gates: tuple[tuple[float, ...], ...] = ()
    keep: tuple[int, ...] = ()
    markers: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    goal: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """trains: adapter specs, "base" for the model's own weights, or both; the rest stays frozen.

    reference: what scores are compared with, "base", the base without adapters, or "start", all there is, both as they are when
    the stage begins. absorb: gates with which the adapters trained so far are merged into the base before the stage begins;
    it then starts without any, and they remain as the teacher's bank of objectives that have one (RAHF).
    """

    trains: tuple[Spec | Literal["base"], ...] = (LoraSpec(),)
    objective: Objective = Dpo()
    optim: Optim = Optim()
    view: View = View()
    reference: Literal["base", "start"] = "base"
    absorb: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Data:
    """path: a file or a hub id; held_out: prompts kept for evaluation; max_length: of prompt and one answer, in tokens.

    columns: what the file calls prompt and completion, () for these names; form: of the records, told by the columns unless named;
    threshold, gap: how scores become labels and pairs (`data.convert`); buckets: padded lengths of the rows of a batch, () for the
    best ones; shared_prompt: lay the answers to a prompt behind one copy of it, which computes the same for less.
    """

    path: str = ""
    split: str | None = None
    columns: tuple[str, ...] = ()
    form: Literal["auto", "pair", "completion", "labelled", "scored", "edited"] = "auto"
    threshold: float | None = None
    gap: float = 0.0
    limit: int | None = None
    held_out: int = 100
    max_length: int = 512
    buckets: tuple[int, ...] = ()
    shared_prompt: bool = True
    template: Literal["auto", "chat", "none"] = "auto"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Train:
    """steps and batch_size (prompts a step, all devices together) hold for each stage.

    microbatches: parts of a batch, one after another (0: as in `step.choose_microbatches`); mesh: (data, fsdp, model), or the name of a
    preset for all devices (`sharding.preset`).
    """

    steps: int = 200
    batch_size: int = 8
    microbatches: int = 0
    save_every: int = 50
    seed: int = 0
    mesh: tuple[int, int, int] | Preset = (1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """prompts: held-out prompts that the model answers at the end, to measure how far it has moved and how long its answers are."""

    prompts: int = 0
    max_new_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a run needs; stored resolved beside every checkpoint and adapter.

    dtype: of weights and activations; quantize: how the linear weights of the base are held while it is frozen (`models.quant`); what
    absorbs adapters is whole again; remat: as in `memory.choose_remat`; attention: as in `attention.choose_attention`; residual:
    whether a mesh with `model` > 1 splits the residual stream by tokens, too, or by rows alone.
    """

    name: str
    model: str = "smollm2-135m-instruct"
    data: Data = Data()
    train: Train = Train()
    stages: tuple[Stage, ...] = (Stage(),)
    out: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Quantize = "none"
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    residual: Literal["sequence", "batch"] = "sequence"
    evaluation: Evaluation = Evaluation()


def check_recipe(recipe: Recipe) -> None:
    """Raises MeetjaxError for a recipe that cannot run, naming the field."""
    _check_type(recipe, Recipe, "")
    if not recipe.stages:
        raise MeetjaxError("recipe: stages", expected="at least one", found="none")
    if not recipe.data.path:
        raise MeetjaxError("recipe: data.path is empty", fix="give a file or hub id: --set data.path=FILE")
    data, train = recipe.data, recipe.train
    bounds: list[tuple[str, Any, bool, str]] = [
        ("train.steps", train.steps, train.steps >= 1, ">= 1"),
        ("train.batch_size", train.batch_size, train.batch_size >= 1, ">= 1"),
        ("train.microbatches", train.microbatches, train.microbatches >= 0, ">= 0"),
        ("train.save_every", train.save_every, train.save_every >= 1, ">= 1"),
        ("train.seed", train.seed, 0 <= train.seed < 2**32, "0 to 2^32 - 1"),
        ("data.held_out", data.held_out, data.held_out >= 0, ">= 0"),
        ("data.max_length", data.max_length, data.max_length >= 8, ">= 8"),
        ("data.columns", data.columns, len(data.columns) in (0, 2), "names of prompt and completion, or ()"),
        ("data.limit", data.limit or 0, data.limit is None or data.limit >= 1, ">= 1"),
        ("data.gap", data.gap, data.gap >= 0, ">= 0"),
        ("data.buckets", data.buckets, _ascending(data.buckets), "ascending lengths, or () for the best"),
        ("evaluation.prompts", recipe.evaluation.prompts, 0 <= recipe.evaluation.prompts <= data.held_out, "0 to data.held_out"),
        ("evaluation.max_new_tokens", recipe.evaluation.max_new_tokens, recipe.evaluation.max_new_tokens >= 1, ">= 1"),
        ("data.seed", data.seed, 0 <= data.seed < 2**32, "0 to 2^32 - 1"),
    ]
    held: dict[str, Spec] = {}
    for i, stage in enumerate(recipe.stages):
        if not stage.trains:
            expected = "base or some of " + ", ".join(KIND_OF.values())
            raise MeetjaxError(f"recipe: stages.{i}.trains: zero trainable leaves", expected=expected, found="()")
        if "base" in stage.trains and recipe.quantize != "none":
            expected = "quantize=none, for integers do not train"
            raise MeetjaxError(f"recipe: stages.{i}.trains: base", expected=expected, found=recipe.quantize)
        name, rewarded = type(stage.objective).__name__, getattr(stage.objective, "reads_rewards", False)
        if stage.absorb and (whole := [kind for kind in held if kind not in MERGEABLE]):
            expected = f"{' or '.join(MERGEABLE)} alone trained before, to be merged"
            raise MeetjaxError(f"recipe: stages.{i}.absorb", expected=expected, found=", ".join(whole))
        own: dict[str, Spec] = {KIND_OF[type(spec)]: spec for spec in stage.trains if spec != "base"}
        held = {} if stage.absorb else held
        for kind, spec in own.items():
            if kind in held and held[kind] != spec:
                expected = f"{held[kind]}, which an earlier stage made and this one goes on with"
                raise MeetjaxError(f"recipe: stages.{i}.trains: {kind}", expected=expected, found=spec)
        held = held | own
        if rewarded and "reward" not in held:
            expected = f"RewardSpec() here or in an earlier stage, the head of {name}"
            raise MeetjaxError(f"recipe: stages.{i}.trains", expected=expected, found="none")
        if not rewarded and "reward" in own:
            raise MeetjaxError(
                f"recipe: stages.{i}.trains", expected=f"what {name} reads", found="RewardSpec(), which gets no gradient from it"
            )
        optim, where, view = stage.optim, f"stages.{i}.optim", stage.view
        bounds += [
            (f"stages.{i}.view.controls", view.controls, view.controls >= 0, ">= 0"),
            (f"stages.{i}.view.gates", view.gates, len(set(map(len, view.gates))) <= 1, "as many for every class"),
            (f"{where}.learning_rate", optim.learning_rate, optim.learning_rate > 0, "> 0"),
            (f"{where}.base_learning_rate", optim.base_learning_rate, optim.base_learning_rate >= 0, ">= 0"),
            (f"{where}.warmup", optim.warmup, 0 <= optim.warmup <= 1, "a fraction, 0 to 1"),
            (f"{where}.weight_decay", optim.weight_decay, optim.weight_decay >= 0, ">= 0"),
            (f"{where}.clip", optim.clip, optim.clip >= 0, ">= 0"),
            (f"{where}.b1", optim.b1, 0 <= optim.b1 < 1, "at least 0 and less than 1"),
            (f"{where}.b2", optim.b2, 0 <= optim.b2 < 1, "at least 0 and less than 1"),
        ]
        bounds += [(f"stages.{i}.objective.{name}", value, ok, told) for name, value, ok, told in bounds_of(stage.objective)]
    for field, value, ok, expected in bounds:
        if not ok:
            raise MeetjaxError(f"recipe: {field}", expected=expected, found=value)
    if train.batch_size % max(1, train.microbatches):
        expected = f"a divisor of train.batch_size = {train.batch_size}"
        raise MeetjaxError("recipe: train.microbatches", expected=expected, found=train.microbatches)


def _ascending(buckets: tuple[int, ...]) -> bool:
    return not buckets or (buckets[0] >= 1 and all(a < b for a, b in pairwise(buckets)))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, with the type of every variant named."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"type": type(value).__name__} | fields
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(recipe)


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Applies `field.path=value` settings; tuples are indexed (`stages.0.optim.learning_rate=1e-3`) or given whole (`a,b`).

    An objective is set by its name in `OBJECTIVES`, with its defaults, and its fields after that (`stages.0.objective.beta=0.5`).

    Raises MeetjaxError for an unknown field, listing those that exist, or a value that is not of the field's type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise MeetjaxError(f"--set {assignment}", expected="field=value", found="no =")
        recipe = _replaced(recipe, Recipe, path.split("."), text, path)
    return recipe


def _replaced(node: Any, hint: Any, path: list[str], text: str, whole: str) -> Any:
    if not path:
        value = _parsed(hint, text)
        if value is UNREADABLE:
            expected = " or ".join(OBJECTIVES) if hint is Objective else _told(hint)
            raise MeetjaxError(f"--set {whole}: value", expected=expected, found=repr(text))
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, tuple):
        hint = _tuple_option(hint)
        if not head.isdigit() or int(head) >= len(node):
            raise MeetjaxError(f"--set {whole}: index {head}", expected=f"0 to {len(node) - 1}", found=head)
        own = _item_hints(hint, len(node))[int(head)]
        return tuple(_replaced(item, own, rest, text, whole) if i == int(head) else item for i, item in enumerate(node))
    fields = _field_hints(type(node)) if dataclasses.is_dataclass(node) else {}
    if head not in fields:
        raise MeetjaxError(f"--set {whole}: field {head}", expected="one of " + (", ".join(fields) or "no further field"), found=head)
    copy: Any = dataclasses.replace
    return copy(node, **{head: _replaced(getattr(node, head), fields[head], rest, text, whole)})


UNREADABLE = object()


def _parsed(hint: Any, text: str) -> Any:
    """`text` as a value of the annotated type, or UNREADABLE."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = (_parsed(option, text) for option in sorted(inner, key=lambda option: option is not NoneType))
        return next((value for value in found if value is not UNREADABLE), UNREADABLE)
    if origin is Literal:
        return text if text in inner else UNREADABLE
    if origin is tuple:
        texts = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        hints = _item_hints(hint, len(texts))
        items = [_parsed(own, item) for own, item in zip(hints, texts, strict=False)]
        return UNREADABLE if len(hints) != len(texts) or any(item is UNREADABLE for item in items) else tuple(items)
    if hint is str:
        return text
    if hint is Objective:
        return OBJECTIVES[text]() if text in OBJECTIVES else UNREADABLE
    if hint is NoneType:
        return None if text.lower() == "none" else UNREADABLE
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), UNREADABLE)
    if hint not in (int, float):
        return UNREADABLE
    try:
        value = hint(text)
    except ValueError:
        return UNREADABLE
    return value if math.isfinite(value) else UNREADABLE


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Raises MeetjaxError naming the innermost field whose value is not of its annotated type (an int passes for a float)."""
    if isinstance(value, tuple):
        hint = _tuple_option(hint)
    hints = _item_hints(hint, len(value)) if get_origin(hint) is tuple and isinstance(value, tuple) else ()
    if hints and len(hints) == len(value):
        for i, item in enumerate(value):
            _check_type(item, hints[i], f"{where}.{i}")
        return
    if not _fits(value, hint) or (hints and len(hints) != len(value)):
        raise MeetjaxError(f"recipe: {where}", expected=_told(hint), found=repr(value))
    if dataclasses.is_dataclass(value):
        for field, own in _field_hints(type(value)).items():
            _check_type(getattr(value, field), own, f"{where}.{field}".lstrip("."))


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint) and not isinstance(value, type)


def _told(hint: Any) -> str:
    """An annotated type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_told(option) for option in inner)
    if origin is Literal:
        return " or ".join(inner)
    if origin is tuple:
        return f"any number of: {_told(inner[0])}" if Ellipsis in inner else f"({', '.join(_told(option) for option in inner)})"
    words = {int: "an integer", float: "a finite number", str: "text", bool: "true or false", NoneType: "none"}
    return words.get(hint, f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}")


def _field_hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _tuple_option(hint: Any) -> Any:
    """Of a choice of types the tuple, if there is one."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return next((option for option in options if get_origin(option) is tuple), hint)


def _item_hints(hint: Any, count: int) -> tuple[Any, ...]:
    """The annotated type of every item of a tuple of `count`; of another length where the annotation fixes one."""
    inner = get_args(hint)
    return inner[:1] * count if Ellipsis in inner else inner
