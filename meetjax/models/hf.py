"""Reading a Hugging Face model folder: config, one or several safetensors files, tokenizer. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.bnb import open_quantised
from meetjax.models.config import ModelConfig, read_config
from meetjax.models.sites import Site
from meetjax.models.weights import Checkpoint, Index, file_shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
HARMLESS = (".rotary_emb.inv_freq",)
"""Name endings of tensors that older exporters wrote and that hold no weights."""


def tensor_name(site: Site, layer: int | None) -> str:
    """Name of a tensor in Llama-family checkpoints."""
    return site.hf if layer is None else f"model.layers.{layer}.{site.hf}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MeetjaxError(f"{path}: not JSON", found=str(error), fix="fetch the file again") from None


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """File -> the tensors that the index puts there (None: no index, so whatever it holds)."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        raise MeetjaxError(
            f"{folder}: no weights", expected=f"{SINGLE} or {INDEX}", fix="save the model with safe_serialization, or fetch its safetensors"
        )
    weight_map = _read_json(folder / INDEX)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise MeetjaxError(f"{folder / INDEX}: field weight_map", expected="an object from tensor to file", found=weight_map)
    files: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise MeetjaxError(f"{folder / INDEX}: file of tensor {tensor}", expected="a file name in the same folder", found=file)
        files.setdefault(folder / file, set()).add(tensor)
    return dict(files)


def _open_tensors(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """(tensor -> lazy slice, tensor -> its file). Raises MeetjaxError for a missing, truncated or corrupt file."""
    slices: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for path, expected in _weight_files(folder).items():
        try:
            handle = safe_open(path, framework="numpy")
            found = set(handle.keys())
        except FileNotFoundError:
            raise MeetjaxError(f"{path}: no such file, though {INDEX} names it", fix="fetch the missing file") from None
        except (SafetensorError, OSError) as error:
            raise MeetjaxError(f"{path}: not a whole safetensors file", found=str(error), fix="fetch the file again") from None
        for tensor in sorted(found ^ expected if expected is not None else ()):
            what = "lacks tensor" if expected and tensor in expected else "holds a tensor unknown to the index,"
            raise MeetjaxError(f"{path}: {what} {tensor}", fix=f"make {INDEX} and the files agree")
        slices |= {tensor: handle.get_slice(tensor) for tensor in found}
        origin |= dict.fromkeys(found, path)
    return slices, origin


def _check_tensors(config: ModelConfig, folder: Path, slices: dict[str, Any], origin: dict[str, Path]) -> None:
    """Raises MeetjaxError unless the tensors are exactly those of `config`, with their shapes and a float dtype."""
    expected = {tensor_name(site, None): site for site in sites.top_sites(config).values()}
    for layer in range(config.layers):
        expected |= {tensor_name(site, layer): site for site in sites.block_sites(config).values()}
    for tensor, site in expected.items():
        if tensor not in slices:
            tied = "; or set tie_word_embeddings in config.json" if site.name == "head" else ""
            raise MeetjaxError(f"{folder}: tensor {tensor} is missing", fix=f"use a complete checkpoint for this config.json{tied}")
        if tuple(slices[tensor].get_shape()) != file_shape(config, site):
            raise MeetjaxError(
                f"{origin[tensor]}: shape of {tensor}",
                expected=file_shape(config, site),
                found=tuple(slices[tensor].get_shape()),
                fix="use the config.json that belongs to these weights",
            )
        if slices[tensor].get_dtype() not in FLOATS:
            raise MeetjaxError(
                f"{origin[tensor]}: dtype of {tensor}",
                expected=" or ".join(FLOATS),
                found=slices[tensor].get_dtype(),
                fix="use an unquantised checkpoint or one of bitsandbytes",
            )
    harmless = {sites.TOP["head"].hf} if config.tied_head else set()  # some exporters write a tied head twice
    for tensor in sorted(slices.keys() - expected.keys() - harmless):
        if not tensor.endswith(HARMLESS):
            raise MeetjaxError(
                f"{origin[tensor]}: unexpected tensor {tensor}",
                expected=f"only the tensors of a {config.model_type} with {config.layers} layers",
                fix="use the config.json that belongs to these weights",
            )


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """End tokens of `generation_config.json`; chat models often list more there than in `config.json`."""
    path = folder / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.is_file() else None
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises MeetjaxError when it is missing or unreadable.

    `tokenizer.json` is read as it is: the model-specific classes of transformers 5 rebuild the pre-tokenizer from their own
    defaults and so split digits differently from the tokenizer that the model was trained with.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return reader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise MeetjaxError(f"{folder}: cannot read the tokenizer", found=str(error)[:200], fix="add tokenizer.json") from None


def open_folder(folder: Path, name: str) -> Checkpoint:
    """Opens a model folder; headers are read and checked, weights are not. What bitsandbytes quantised is dequantised as it is read.

    Raises MeetjaxError for a missing or broken file, and for a missing, unexpected or misshapen tensor.
    """
    config = read_config(folder / "config.json")
    config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + _generation_eos(folder))))
    stored, origin = _open_tensors(folder)
    slices = open_quantised(stored, origin)
    _check_tensors(config, folder, slices, origin)

    def read(site: Site, layer: int | None, index: Index) -> np.ndarray:
        return slices[tensor_name(site, layer)][index]

    return Checkpoint(name, config, read, sliced=slices == stored, make_tokenizer=lambda: read_tokenizer(folder))
