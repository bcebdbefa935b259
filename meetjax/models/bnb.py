"""Checkpoints that bitsandbytes quantised: 4-bit blocks (NF4 and FP4, with or without double quantisation) and LLM.int8().

    4 bits:  w[n] = map[code[n]] absmax[n // blocksize],   codes two a byte, the first in the high half, in C order of (out, in)
             absmax = nested_map[c] nested_absmax[. // nested_blocksize] + offset where it is itself quantised
    8 bits:  W[o, i] = q[o, i] SCB[o] / 127

Dettmers et al. (2023), arXiv 2305.14314, and (2022), arXiv 2208.07339. The tensors beside a weight say all of it. A weight is dequantised
as it is read, once; `models.quant` makes integers of it again where those are wanted, of its own kind.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from meetjax.errors import MeetjaxError
from meetjax.models.weights import Index

STATE = ".quant_state.bitsandbytes__"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Dequantised:
    """Stands where a lazy slice of safetensors would: shape, dtype, and `[index]`, which reads and dequantises the whole tensor."""

    def __init__(self, shape: tuple[int, ...], dtype: str, read: Any):
        self._shape, self._dtype, self._read = shape, dtype, read

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return self._read()[index]


def open_quantised(slices: dict[str, Any], origin: dict[str, Path]) -> dict[str, Any]:
    """The tensors with every quantised weight, and all that stands beside it, behind one `Dequantised` under its own name.

    Raises MeetjaxError for a state that cannot be read, and a tensor beside a weight that is missing or of another size.
    """
    found = dict(slices)
    for name in slices:
        weight, state, kind = name.partition(STATE)
        if state:
            found[weight] = _four_bits(weight, kind, slices, origin)
            for beside in (name, *(weight + ending for ending in BESIDE)):
                found.pop(beside, None)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = _eight_bits(weight, name, slices, origin)
            for beside in (name, weight + "_format"):
                found.pop(beside, None)
    return found


def _part(name: str, weight: str, slices: dict[str, Any], size: int | None = None) -> np.ndarray:
    """A whole tensor beside `weight`, flat. Raises MeetjaxError where it is missing or has not `size` numbers."""
    if name not in slices:
        raise MeetjaxError(f"tensor {name} is missing", expected=f"it beside {weight}, which is quantised", fix="use a complete checkpoint")
    numbers = np.asarray(slices[name][...]).reshape(-1)
    if size is not None and numbers.size != size:
        raise MeetjaxError(f"tensor {name}: size", expected=size, found=numbers.size, fix="use a complete checkpoint")
    return numbers


def _four_bits(weight: str, kind: str, slices: dict[str, Any], origin: dict[str, Path]) -> Dequantised:
    where = f"{origin[weight + STATE + kind]}: {weight}"
    try:
        state = json.loads(_part(weight + STATE + kind, weight, slices).tobytes())
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        dtype, nested = NAMES[state["dtype"]], "nested_blocksize" in state
        nested_block, offset = (int(state["nested_blocksize"]), float(state["nested_offset"])) if nested else (1, 0.0)
    except (ValueError, KeyError, TypeError) as error:
        raise MeetjaxError(f"{where}: quantisation state", expected="that of bitsandbytes in 4 bits", found=repr(error)) from None
    count = math.prod(shape)
    blocks = -(-count // block)

    def read() -> np.ndarray:
        packed = _part(weight, weight, slices).view(np.uint8)  # stored as bytes, or as floats that hold them
        if packed.size != -(-count // 2):
            raise MeetjaxError(f"{where}: bytes", expected=-(-count // 2), found=packed.size, fix="use a complete checkpoint")
        table = _part(f"{weight}.quant_map", weight, slices, 16).astype(np.float32)
        absmax = _part(f"{weight}.absmax", weight, slices, blocks)
        if nested:
            nested_map = _part(f"{weight}.nested_quant_map", weight, slices, 256).astype(np.float32)
            outer = _part(f"{weight}.nested_absmax", weight, slices, -(-blocks // nested_block)).astype(np.float32)
            absmax = nested_map[absmax] * np.repeat(outer, nested_block)[:blocks] + np.float32(offset)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
        return (table[codes] * np.repeat(absmax.astype(np.float32), block)[:count]).reshape(shape)

    return Dequantised(shape, dtype, read)


def _eight_bits(weight: str, scales: str, slices: dict[str, Any], origin: dict[str, Path]) -> Dequantised:
    if weight not in slices or slices[weight].get_dtype() != "I8" or len(slices[weight].get_shape()) != 2:
        found = "none" if weight not in slices else slices[weight].get_dtype()
        raise MeetjaxError(f"{origin[scales]}: {weight}", expected=f"a matrix of int8 beside {scales}", found=found)
    shape = tuple(slices[weight].get_shape())

    def read() -> np.ndarray:
        scale = _part(scales, weight, slices, shape[0]).astype(np.float32) / np.float32(127)
        return slices[weight][...].astype(np.float32) * scale[:, None]

    return Dequantised(shape, "F32", read)
