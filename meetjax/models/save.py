"""`save_model`: a Hugging Face folder that `meetjax.load` and transformers read, computed from the table that the loader reads by."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import FAMILIES, LLAMA_BIASES, ModelConfig, to_hf
from meetjax.models.fingerprint import fingerprint
from meetjax.models.hf import SINGLE, tensor_name
from meetjax.models.load import Model
from meetjax.models.quant import dequantize_params
from meetjax.models.sites import Site
from meetjax.models.weights import file_shape, transposed
from meetjax.types import Params

STORED = {"float32": "F32", "bfloat16": "BF16"}
OURS = "meetjax"
"""Key in the header of our weight files; its value names the files of the folder."""


def save_model(model: Model, folder: str | Path) -> Path:
    """Writes `model.safetensors` (every leaf in its own dtype), `config.json` and the tokenizer with its chat template.

    A quantised base is written dequantised. A tied head is written once, as the embedding. Biases that the format has only together
    with others get zeros beside them (see `writable`), so the folder of an edit merged into `down` computes the same with more leaves.
    One leaf at a time is on the host.
    The folder appears whole or not at all; one that `save_model` wrote before is replaced. Raises MeetjaxError, with nothing
    changed, for another folder or a file in its place, a model that the format cannot say, and leaves that are not finite.
    """
    folder = Path(folder).absolute()
    config = check_writable(model.config, folder)
    params = _with_zero_biases(model, config)
    made, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
        made.mkdir(parents=True)
        dtype = str(params["embed"].dtype)
        # `torch_dtype` is the name that every transformers reads.
        (made / "config.json").write_text(json.dumps(to_hf(config) | {"torch_dtype": dtype}, indent=2) + "\n")
        model.tokenizer.save_pretrained(str(made))
        files = sorted([*(path.name for path in made.iterdir()), SINGLE])
        _write_tensors(made / SINGLE, config, params, {"format": "pt", OURS: " ".join(files)})
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(made, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise MeetjaxError(f"{folder}: model could not be saved", found=error, fix="free space or choose another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def check_writable(config: ModelConfig, folder: str | Path) -> ModelConfig:
    """The config that `save_model` would write into `folder`. Raises MeetjaxError when it would refuse; touches nothing.

    Ours to replace is an empty folder, or one with our weight file and no file but those that were written with it.
    """
    folder = Path(folder)
    config = writable(config)
    to_hf(config)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise MeetjaxError(f"{folder}: not a folder", expected="a new folder or a model that meetjax wrote", fix="choose another name")
    if folder.is_dir() and (spare := sorted({path.name for path in folder.iterdir()} - _own_files(folder))):
        raise MeetjaxError(
            f"{folder}: would be overwritten", expected="nothing there, or a model that meetjax wrote", found=spare[0],
            fix="choose another folder, or move it away",
        )  # fmt: skip
    return config


def writable(config: ModelConfig) -> ModelConfig:
    """The config itself where its family has its biases; else with the fewest more, as a llama where no window forbids.

    A llama has biases at q k v o together and at gate up down together, qwen2 always at q k v, mistral none. Raises MeetjaxError
    where neither the own family nor a llama has them.
    """
    has = set(config.biases)
    for family in dict.fromkeys((config.model_type, "llama")):
        fixed = FAMILIES[family][1]
        groups = LLAMA_BIASES.values() if family == "llama" else ()
        given = set(fixed).union(*(group for group in groups if has & set(group)))
        if has <= given and (family == config.model_type or config.sliding_window is None):
            return dataclasses.replace(config, model_type=family, biases=tuple(sorted(given)))
    expected = f"{', '.join(FAMILIES[config.model_type][1]) or 'none'}, or no sliding window"
    what = f"config: a {config.model_type} with a sliding window cannot have these biases"
    raise MeetjaxError(what, expected=expected, found=", ".join(config.biases), fix="keep the edit as an adapter")


def _own_files(folder: Path) -> set[str]:
    """The files that `save_model` wrote there; none where it did not."""
    try:
        with safe_open(folder / SINGLE, framework="numpy") as file:
            return set((file.metadata() or {}).get(OURS, "").split())
    except (OSError, SafetensorError):
        return set()


def _with_zero_biases(model: Model, config: ModelConfig) -> Params:
    """The parameters with the biases that `writable` added. Raises MeetjaxError for a tree or dtype that is not the model's."""
    whole = dequantize_params(model.params)
    fingerprint(model.config, whole)  # for its check of the tree
    blocks = dict(whole["blocks"])
    for site in sites.block_sites(config).values():
        if site.name not in blocks:
            blocks[site.name] = np.zeros((config.layers, *sites.shape(config, site)), blocks[site.bias_of].dtype)
    params = whole | {"blocks": blocks}
    for path, leaf in _leaves(config, params):
        if str(leaf.dtype) not in STORED:
            raise MeetjaxError(f"params: dtype of {path.name}", expected=" or ".join(STORED), found=leaf.dtype)
    return params


def _leaves(config: ModelConfig, params: Params) -> Iterator[tuple[Site, Any]]:
    for site in sites.top_sites(config).values():
        yield site, params[site.name]
    for site in sites.block_sites(config).values():
        yield site, params["blocks"][site.name]


def _write_tensors(path: Path, config: ModelConfig, params: Params, metadata: dict[str, str]) -> None:
    """A safetensors file, leaf by leaf: `safetensors.numpy.save_file` wants all of them in memory at once, a copy of the model.

    The format: the length of the header (uint64), the header (JSON, padded to 8 bytes), and the tensors in C order, little-endian.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    # Wide numbers first, so that each begins at a multiple of its size.
    leaves = sorted(_leaves(config, params), key=lambda item: -item[1].dtype.itemsize)
    for site, leaf in leaves:
        shape = file_shape(config, site)
        size = math.prod(shape) * leaf.dtype.itemsize
        for layer in (None,) if site.name in sites.TOP else range(config.layers):
            entry = {"dtype": STORED[str(leaf.dtype)], "shape": list(shape), "data_offsets": [at, at + size]}
            header[tensor_name(site, layer)] = entry
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for site, leaf in leaves:
            host = np.asarray(jax.device_get(leaf))
            if not np.isfinite(host).all():
                raise MeetjaxError(f"params: leaf {site.name}", expected="finite numbers", found="NaN or infinity", fix="nothing was saved")
            for tensor in (host,) if site.name in sites.TOP else host:
                file.write(np.ascontiguousarray(tensor.T if transposed(site) else tensor).view(np.uint8).data)
