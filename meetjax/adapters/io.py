"""Adapters on disk: a safetensors file of the bank alone beside a manifest.

The base is never in the file; the manifest names it by fingerprint, and loading onto another base is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from meetjax.adapters.tree import KINDS, Bank, Edit, EditSite, Identity, Lora, LoraSite, Prompt, Reward, entry_axis, flatten, kinds
from meetjax.errors import MeetjaxError

FILE, MANIFEST, FORMAT = "adapters.safetensors", "manifest.json", 1


def save_adapters(
    folder: str | Path, bank: Bank, *, base: str, fingerprint: str, quantize: str = "none", recipe: dict[str, Any] | None = None
) -> Path:
    """Writes `adapters.safetensors` and `manifest.json` (kinds, sites, gate columns, base name and fingerprint, recipe).

    quantize: how the base was held in training. It is told and does not bind: whoever trains on integers serves on whole weights too.
    Each file appears whole or not at all. Raises MeetjaxError when the folder cannot be written or a leaf is not finite.
    """
    folder = Path(folder)
    # safetensors.numpy silently writes wrong data for views, hence the contiguous copies.
    leaves = {path: np.ascontiguousarray(jax.device_get(leaf)) for path, leaf in flatten(bank).items()}
    for path, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise MeetjaxError(f"adapters: leaf {path}", expected="finite numbers", found="NaN or infinity", fix="nothing was saved")
    manifest = {
        "format": FORMAT,
        "base": base,
        "fingerprint": fingerprint,
        "quantize": quantize,
        "kinds": {
            kind: {"entries": list(tree.entries), "sites": sorted({path.split("/")[1] for path in leaves if path.startswith(kind + "/")})}
            | ({"scale": tree.scale} if kind == "lora" else {})
            for kind, tree in ((kind, getattr(bank, kind)) for kind in kinds(bank))
        },
        "recipe": recipe or {},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(leaves, folder / (FILE + ".partial"))
        (folder / (MANIFEST + ".partial")).write_text(json.dumps(manifest, indent=2, default=str) + "\n")
        for name in (FILE, MANIFEST):
            os.replace(folder / (name + ".partial"), folder / name)
    except (OSError, SafetensorError) as error:
        raise MeetjaxError(f"{folder}: adapters could not be saved", found=error, fix="free space or choose another folder") from error
    return folder


def load_adapters(folder: str | Path, fingerprint: str | None = None) -> Bank:
    """Reads a bank. Raises MeetjaxError for a missing, truncated or foreign file, or one trained on another base.

    fingerprint: of the base at hand (`Model.fingerprint`); None skips the check, for tools that only look.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise MeetjaxError(
            f"{folder}: adapter of another base",
            expected=f"base {manifest['base']} ({manifest['fingerprint'][:12]})",
            found=fingerprint[:12],
            fix="load the base it was trained on",
        )
    try:
        leaves = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise MeetjaxError(f"{folder / FILE}: not a whole safetensors file", found=error, fix="copy or train it again") from None
    fields: dict[str, Any] = {}
    for kind, facts in manifest["kinds"].items():
        own = {path.removeprefix(kind + "/"): jnp.asarray(leaf) for path, leaf in leaves.items() if path.startswith(kind + "/")}
        try:
            entries = tuple(facts["entries"])
            if kind == "prompt":
                fields[kind] = Prompt(own["vectors"], entries)
            elif kind == "lora":
                fields[kind] = Lora(**_by_site(own, LoraSite, ("a", "b")), scale=facts["scale"], entries=entries)
            elif kind == "edit":
                fields[kind] = Edit(**_by_site(own, EditSite, ("s", "t")), entries=entries)
            elif kind == "identity":
                fields[kind] = Identity({path.removeprefix("block/"): leaf for path, leaf in own.items()}, entries)
            else:
                fields[kind] = Reward(own["u"], entries)
            counts = {leaf.shape[entry_axis(kind)] for leaf in own.values()}
            if counts != {len(entries)}:
                raise ValueError(f"{len(entries)} gate columns for {sorted(counts)} adapters")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise MeetjaxError(f"{folder / FILE}: leaves of {kind} do not match the manifest", found=error) from None
    bank = Bank(**fields)
    if spare := sorted(set(leaves) - set(flatten(bank))):
        raise MeetjaxError(f"{folder / FILE}: leaves that the manifest does not name", found=spare[0], fix="copy both files again")
    return bank


def unread(error: OSError) -> str:
    """What a file that cannot be opened suffers from."""
    return "no such file" if isinstance(error, FileNotFoundError | NotADirectoryError) else f"cannot be read ({error.strerror})"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an adapter folder. Raises MeetjaxError when it is missing or not one of ours."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        complete = manifest["format"] == FORMAT and {"base", "fingerprint", "kinds"} <= set(manifest)
    except OSError as error:
        fix = "give the folder that holds manifest.json"
        raise MeetjaxError(f"{path}: {unread(error)}", expected="an adapter folder", fix=fix) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise MeetjaxError(f"{path}: not a manifest", found=error) from None
    if not complete or not set(manifest["kinds"]) <= set(KINDS):
        raise MeetjaxError(f"{path}: not a manifest of this version", expected=f"format {FORMAT}", found=manifest["format"])
    return manifest


def _by_site(leaves: dict[str, Any], site_type: type, fields: tuple[str, str]) -> dict[str, Any]:
    names = {path.split("/")[0] for path in leaves}
    return {name: site_type(*(leaves[f"{name}/{field}"] for field in fields)) for name in names}
