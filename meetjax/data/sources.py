"""Where rows come from: JSON lines, CSV and Parquet files and hub sets, each row with its `file:line`."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meetjax.errors import MeetjaxError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
CSV_SUFFIXES = (".csv", ".csv.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = JSON_SUFFIXES + CSV_SUFFIXES + PARQUET_SUFFIXES
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")
BUILT_IN = {"concise": Path(__file__).parent / "concise.jsonl"}
"""Sets that come with the package, by name."""
PARQUET_BATCH = 1024  # rows decoded at a time


def iterate_rows(source: str | Path, split: str | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (row, where) from a file or a hub set.

    `source` is a path ending in .jsonl, .json (one object a line) or .csv (names in the first line, every value text), each also
    with .gz, or .parquet; a hub id `org/name`, or `org/name:folder` for one folder of a set; or the name of a set that comes with
    the package, "concise". `where` is `path:line` (`path:row` for Parquet) or `id[split]:row`, from 1.
    Raises MeetjaxError for a missing or unreadable file, a broken line, an unknown ending, an unknown set or split.
    """
    path = BUILT_IN.get(str(source)) or Path(source).expanduser()
    name = path.name.lower()
    known = name.endswith(SUFFIXES)
    if not path.exists() and not known and HUB_ID.fullmatch(str(source)):
        return _hub_rows(str(source), split)
    if split is not None:
        raise MeetjaxError(
            f"{source}: split", expected="no split, a file has only itself", found=repr(split), fix="give no split (data.split=none)"
        )
    if not path.exists():
        raise MeetjaxError(f"{source}: no such file", expected="a .jsonl, .json, .csv or .parquet file, or a hub id such as org/name")
    if not path.is_file():
        raise MeetjaxError(f"{source}: not a file", expected="a file", found="a folder")
    if not known:
        raise MeetjaxError(f"{source}: file name", expected=f"an ending among {', '.join(SUFFIXES)}", found=name)
    if name.endswith(CSV_SUFFIXES):
        return _csv_rows(path, source)
    return _parquet_rows(path, source) if name.endswith(PARQUET_SUFFIXES) else _json_rows(path, source)


def _json_rows(path: Path, source: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as lines:
            # bytes, not text: a line ends at \n only (JSON strings may hold U+2028), and a bad byte has a line number
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_object(line, f"{source}:{number}"), f"{source}:{number}"
    except (OSError, EOFError, zlib.error) as error:
        raise MeetjaxError(f"{source}:{number + 1}: cannot be read", found=error) from error


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise MeetjaxError(f"{where}: not UTF-8", expected="UTF-8 text", found=f"{error.reason} at byte {error.start}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise MeetjaxError(f"{where}: broken JSON", expected="one JSON object a line", found=error) from error
    if not isinstance(row, dict):
        raise MeetjaxError(f"{where}: not a JSON object", expected="one JSON object a line", found=type(row).__name__)
    return row


def _csv_rows(path: Path, source: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    number = 0
    try:
        opened = gzip.open if path.name.lower().endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            for row in rows:
                number = rows.line_num
                if None in row or None in row.values():  # more fields than names, or fewer
                    expected = f"{len(rows.fieldnames or ())} fields, as many as the first line"
                    raise MeetjaxError(f"{source}:{number}: broken row", expected=expected, found="more" if None in row else "fewer")
                yield row, f"{source}:{number}"
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise MeetjaxError(f"{source}: cannot be read as CSV after line {number}", found=error) from error


def _parquet_rows(path: Path, source: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow  # heavy, and only this branch needs it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{source}:{number}"
    except (OSError, pyarrow.ArrowException) as error:
        raise MeetjaxError(f"{source}:{number + 1}: cannot be read as Parquet", found=error) from error


def _hub_rows(source: str, split: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets  # heavy, and only this branch needs it
    from datasets.exceptions import DatasetsError

    name, _, folder = source.partition(":")
    try:
        found: Any = datasets.load_dataset(name, data_dir=folder or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        where = source if split is None else f"{source}[{split}]"
        raise MeetjaxError(f"{where}: cannot be loaded from the hub", expected="a set and split that exist", found=error) from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise MeetjaxError(f"{source}: split", expected=f"one of {', '.join(sorted(found))}", found="none given", fix="name the split")
        split, found = next(iter(found.items()))
    for number, row in enumerate(found, start=1):
        yield row, f"{source}[{split}]:{number}"
