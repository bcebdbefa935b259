"""The bank: typed adapter trees as plain data.

Zero is neutral for every kind, so strength, mixing and padding are tree arithmetic. Every kind stores its leaves with an
axis E over the adapters of that kind, and `entries` (static) names the gate column that each of them answers to: a bank of
eight adapters of mixed kinds costs each kind only the adapters it really has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Float

from meetjax.errors import MeetjaxError
from meetjax.types import Array

KINDS = ("prompt", "lora", "edit", "identity", "reward")
MERGEABLE = ("lora", "edit")
"""Kinds that are part of a linear layer, and can be folded into it."""


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """Soft prompts (Lester et al. 2021, arXiv 2104.08691). A vector of zeros is an empty slot: nothing attends to it."""

    vectors: Float[Array, "E P D"]
    entries: tuple[int, ...] = _static((0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraSite:
    """One low-rank difference W + scale a b. Layers lead, so a stacked tree is a scanned input."""

    a: Float[Array, "L E I R"]
    b: Float[Array, "L E R out"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): one field a linear site, None where it does not act; `scale` = alpha / rank."""

    q: LoraSite | None = None
    k: LoraSite | None = None
    v: LoraSite | None = None
    o: LoraSite | None = None
    gate: LoraSite | None = None
    up: LoraSite | None = None
    down: LoraSite | None = None
    scale: float = _static(1.0)
    entries: tuple[int, ...] = _static((0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EditSite:
    """One edit y (1 + s) + t, stored as differences from the identity, always float32."""

    s: Float[Array, "L E out"]
    t: Float[Array, "L E out"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """RED (Wu et al. 2024, arXiv 2402.15179) on `down`; RED+ on all five."""

    q: EditSite | None = None
    k: EditSite | None = None
    v: EditSite | None = None
    o: EditSite | None = None
    down: EditSite | None = None
    entries: tuple[int, ...] = _static((0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
    """CLM (Zhu et al. 2025, arXiv 2503.04346): n decoder blocks in front of block 0; leaves are [n, E, ...] by site name."""

    block: dict[str, Float[Array, "n E ..."]]
    entries: tuple[int, ...] = _static((0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reward:
    """Reward heads u . h on the normed hidden state, always float32: they read the model, and no logit depends on them."""

    u: Float[Array, "E D"]
    entries: tuple[int, ...] = _static((0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """Any subset of kinds. Gate column c drives every adapter whose `entries` names c."""

    prompt: Prompt | None = None
    lora: Lora | None = None
    edit: Edit | None = None
    identity: Identity | None = None
    reward: Reward | None = None


def kinds(bank: Bank) -> tuple[str, ...]:
    """Names of the kinds that the bank holds."""
    return tuple(kind for kind in KINDS if getattr(bank, kind) is not None)


def entry_axis(kind: str) -> int:
    """The axis E of a kind's leaves: soft prompts and reward heads have no layers in front of it."""
    return 0 if kind in ("prompt", "reward") else 1


def columns(bank: Bank) -> int:
    """A, the number of gate columns."""
    return 1 + max((max(getattr(bank, kind).entries) for kind in kinds(bank)), default=-1)


def column_names(name: str, bank: Bank) -> list[str]:
    """What the gate columns of the adapter `name` are called: `name` where there is one, else `name.0`, `name.1`, ..."""
    width = columns(bank)
    return [name] if width == 1 else [f"{name}.{column}" for column in range(width)]


def count_parameters(tree: Any) -> int:
    """Numbers stored in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def check_gates(bank: Bank | None, gates: Array | None, rows: int) -> None:
    """Raises MeetjaxError unless gates are [rows, A], finite, and not negative for prompts. Call outside jit."""
    if gates is None:
        return
    if bank is None:
        raise MeetjaxError("gates without adapters", fix="pass the bank that they gate")
    width = columns(bank)
    if gates.shape != (rows, width):
        raise MeetjaxError("gates: shape", expected=f"({rows}, {width}): rows, bank columns", found=tuple(gates.shape))
    values = jax.device_get(gates)
    if not (abs(values) < float("inf")).all():
        raise MeetjaxError("gates: value", expected="finite numbers", found=values.tolist())
    if bank.prompt is not None and (values[:, list(bank.prompt.entries)] < 0).any():
        raise MeetjaxError(
            "gates: value of a soft prompt",
            expected=">= 0 (its logarithm biases attention)",
            found=float(values.min()),
            fix="use the logit dial for negative strengths",
        )


def flatten(tree: Any) -> dict[str, Array]:
    """Arrays by path, as in `lora/q/a`; the inverse needs the structure: see `unflatten`."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(like: Any, leaves: dict[str, Array]) -> Any:
    """Rebuilds a tree of the structure of `like` from `flatten`'s mapping. Raises MeetjaxError for a missing or spare path."""
    paths = list(flatten(like))
    if set(paths) != set(leaves):
        missing, spare = sorted(set(paths) - set(leaves)), sorted(set(leaves) - set(paths))
        raise MeetjaxError("stored tree", expected=f"leaves {missing or 'as stored'}", found=f"{spare or 'none of them'}")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in paths])
