"""A run's numbers in one file, `summary.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meetjax.errors import MeetjaxError


def write_summary(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes `folder/summary.json` in one move, so that a reader sees the old file or the new one; returns its path.

    Array scalars become numbers, and what is not finite becomes null. Raises MeetjaxError when it cannot be written.
    """
    text = json.dumps(_plain(summary, "summary"), indent=2, allow_nan=False, ensure_ascii=False)
    return write_whole(Path(folder) / "summary.json", text + "\n")


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it; numpy and jax scalars and arrays become numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist(), where)
    raise MeetjaxError(f"{where}: not a value of summary.json", expected="text, numbers, lists and mappings", found=type(value).__name__)


def write_whole(path: Path, text: str) -> Path:
    """Writes a file in one move and returns its path; raises MeetjaxError when it cannot be written."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise MeetjaxError(
            f"{path}: cannot write", found=error.strerror or str(error), fix="free disk space or choose another folder"
        ) from error
    return path
