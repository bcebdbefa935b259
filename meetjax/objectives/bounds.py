"""Hyperparameters that state their own bounds, one word where a field is declared, so that a recipe is checked before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def bounded(default: float, ok: Callable[[Any], bool], expected: str) -> Any:
    """A dataclass field with a default and a bound: `ok(value)` is what `expected` says in words."""
    return dataclasses.field(default=default, metadata={"bound": (ok, expected)})


def positive(default: float) -> Any:
    """A field > 0: a temperature, a scale."""
    return bounded(default, lambda value: value > 0, "> 0")


def not_negative(default: float) -> Any:
    """A field >= 0: a weight, a margin."""
    return bounded(default, lambda value: value >= 0, ">= 0")


def flip_rate(default: float) -> Any:
    """A field in [0, 1/2): the fraction of pairs whose answers are taken to be swapped; at 1/2 a pair says nothing."""
    return bounded(default, lambda value: 0 <= value < 0.5, "at least 0 and less than 0.5")


def bounds_of(objective: Any) -> Iterator[tuple[str, Any, bool, str]]:
    """(field, value, whether it is within its bound, the bound in words) of every field that states one."""
    for field in dataclasses.fields(objective) if dataclasses.is_dataclass(objective) else ():
        if "bound" in field.metadata:
            ok, expected = field.metadata["bound"]
            value = getattr(objective, field.name)
            yield field.name, value, ok(value), expected
