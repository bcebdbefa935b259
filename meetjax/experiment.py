"""An experiment's Python file, read: its recipe, or an error that names the file and the line."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from meetjax.errors import MeetjaxError
from meetjax.train.stage import Recipe


def read_recipe(file: Path) -> Recipe:
    """What its get_config() returns. Raises MeetjaxError for anything else."""
    get_config = getattr(read_module(file), "get_config", None)
    recipe = told_where(file, get_config) if callable(get_config) else None
    if not isinstance(recipe, Recipe):
        raise MeetjaxError(f"{file}: get_config()", expected="a function that returns a Recipe", found=type(recipe).__name__)
    return recipe


def read_module(file: Path) -> ModuleType:
    """The file as a module. Raises MeetjaxError that names the file and the line of what it raised."""
    if not file.is_file():
        raise MeetjaxError(f"{file}: no such file", expected="an experiment with get_config()", fix="see experiments/README.md")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise MeetjaxError(f"{file}: not a Python file", expected="a name ending in .py")
    module = importlib.util.module_from_spec(spec)
    told_where(file, partial(spec.loader.exec_module, module))
    return module


def told_where(file: Path, call: Callable[[], Any]) -> Any:
    """What the user's code returns; what it raises becomes an error that names the file and the line."""
    try:
        return call()
    except MeetjaxError as error:
        raise MeetjaxError(f"{file}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise MeetjaxError(f"{file}{f':{line}' if line else ''}: cannot be run", found=f"{type(error).__name__}: {error}") from error
