"""Token rows kept between runs: what tokenising made of the same records, tokenizer and settings, found again by content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from meetjax.data.audit import Audit, Finding
from meetjax.data.records import Record
from meetjax.data.tokenize import Rows, tokenize_records
from meetjax.errors import MeetjaxError
from meetjax.models.sources import cache_dir
from meetjax.types import Tokenizer

LEAST = 1000
"""Records from which on rows are kept: fewer are tokenised in the time that finding them takes."""
UNREADABLE = OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile


def cached_rows(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    max_length: int,
    template: Literal["auto", "chat", "none"] = "auto",
    markers: tuple[str, ...] = (),
    whole: bool = False,
) -> tuple[Rows, Audit]:
    """`tokenize_records`, or what it returned when it was asked the same before.

    A key names all that rows depend on (records, tokenizer, settings, this code), so that no entry can be stale. Raises MeetjaxError
    like `tokenize_records`, and when the cache folder cannot be used.
    """
    if len(records) < LEAST:
        return tokenize_records(records, tokenizer, max_length, template, markers=markers, whole=whole)
    settings = repr((max_length, template, markers, whole, tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token))
    digest = hashlib.sha256("\n".join([_code(), settings, tokenizer.backend_tokenizer.to_str()]).encode())
    for record in records:
        digest.update(repr(record).encode(errors="surrogatepass"))
    file = cache_dir() / "rows" / f"{digest.hexdigest()[:32]}.npz"
    try:
        if file.exists():
            return _read(file)
    except UNREADABLE as error:
        raise _unusable(file, error) from error
    rows, audit = tokenize_records(records, tokenizer, max_length, template, markers=markers, whole=whole)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as out:
            columns: dict[str, Any] = {name: column for name, column in vars(rows).items() if isinstance(column, np.ndarray)}
            np.savez(out, audit=json.dumps(dataclasses.asdict(audit)), **columns)
        os.replace(partial, file)
    except OSError as error:
        raise _unusable(file, error) from error
    return rows, audit


def _unusable(file: Path, error: Exception) -> MeetjaxError:
    fix = "delete it, or set MEETJAX_CACHE to a folder that can be written"
    return MeetjaxError(f"{file}", expected="token rows that can be read and written", found=error, fix=fix)


def _read(file: Path) -> tuple[Rows, Audit]:
    with open(file, "rb") as opened, np.load(opened) as stored:  # np.load leaves a broken file open
        columns: dict[str, Any] = dict(stored)
    told = json.loads(str(columns.pop("audit")))
    for kind in ("excluded", "noted"):
        told[kind] = {reason: Finding(**finding) for reason, finding in told[kind].items()}
    return Rows(**columns), Audit(**told)


@functools.cache
def _code() -> str:
    """Digest of the code that rows come from."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for name in ("audit.py", "records.py", "template.py", "tokenize.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()
