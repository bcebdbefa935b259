"""Reading a GGUF file without torch: header, `ModelConfig`, dequantised tensors in the layout of Hugging Face.

The header is parsed here (format version 2 and 3): `gguf.GGUFReader` makes a NumPy view of every token and merge, which costs
seconds for a vocabulary. Blocks are decoded by `gguf.quants`.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np

from meetjax.errors import MeetjaxError
from meetjax.models import config as configs
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.models.sites import Site
from meetjax.models.weights import Checkpoint, Index, file_shape

Kind = ggml.GGMLQuantizationType
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
ROPE_FREQS = "rope_freqs.weight"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: shape in row-major order (headers hold it reversed), ggml type number, first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata by key, tensors by name."""

    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def _read_string(data: memoryview, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    at += 8
    if at + size > len(data):
        raise struct.error("string runs past the end of the file")
    return str(data[at : at + size], "utf-8"), at + size


def _read_value(data: memoryview, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _read_string(data, at)
    if kind == _ARRAY:
        item, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if item in _SCALARS:
            layout = f"<{count}{_SCALARS[item]}"
            return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
        values = []
        for _ in range(count):
            value, at = _read_value(data, at, item)
            values.append(value)
        return values, at
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    layout = "<" + _SCALARS[kind]
    return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)


def _parse_header(data: memoryview) -> Header:
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r} version {version}, not a little-endian GGUF of version 2 or 3")
    at, meta, tensors = 24, {}, {}
    for _ in range(key_count):
        key, at = _read_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        meta[key], at = _read_value(data, at + 4, kind)
    for _ in range(tensor_count):
        name, at = _read_string(data, at)
        (rank,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
        at += 4 + 8 * rank + 12
        tensors[name] = Tensor(tuple(reversed(shape)), kind, offset)
    step = meta.get("general.alignment", ggml.GGUF_DEFAULT_ALIGNMENT)
    start = -(-at // step) * step
    return Header(meta, {name: dataclasses.replace(t, offset=start + t.offset) for name, t in tensors.items()})


def _kind_name(kind: int) -> str:
    return Kind(kind).name if kind in Kind._value2member_map_ else f"type {kind}"


def _byte_size(tensor: Tensor) -> int:
    per_block, block_bytes = ggml.GGML_QUANT_SIZES[Kind(tensor.kind)]
    return math.prod(tensor.shape) // per_block * block_bytes


def read_header(path: Path) -> tuple[Header, np.memmap]:
    """(header, the mapped file). Raises MeetjaxError for a file that is missing, no GGUF, cut short or of an unsupported type."""
    try:
        data = np.memmap(path, np.uint8, "r")
        buffer: Any = data
        header = _parse_header(memoryview(buffer))
    except FileNotFoundError:
        raise MeetjaxError(f"{path}: no such file") from None
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        raise MeetjaxError(f"{path}: not a whole GGUF file", found=str(error), fix="fetch the file again") from None
    if header.meta.get("split.count", 1) > 1:
        raise MeetjaxError(f"{path}: part of a split model", fix="join the parts with gguf-split --merge")
    for name, tensor in header.tensors.items():
        if tensor.kind not in KINDS:
            raise MeetjaxError(
                f"{path}: type of tensor {name}", expected=" or ".join(kind.name for kind in KINDS), found=_kind_name(tensor.kind)
            )
        per_block = ggml.GGML_QUANT_SIZES[Kind(tensor.kind)][0]
        if not tensor.shape or tensor.shape[-1] % per_block:
            raise MeetjaxError(
                f"{path}: rows of tensor {name}", expected=f"whole blocks of {per_block}", found=tensor.shape, fix="fetch the file again"
            )
        if tensor.offset + _byte_size(tensor) > data.size:
            raise MeetjaxError(
                f"{path}: the file ends inside tensor {name}",
                expected=f"{tensor.offset + _byte_size(tensor)} bytes or more",
                found=f"{data.size} bytes",
                fix="fetch the file again",
            )
    return header, data


def dequantise(data: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The whole tensor as float32 in row-major order."""
    raw = np.asarray(data[tensor.offset : tensor.offset + _byte_size(tensor)])
    per_block, block_bytes = ggml.GGML_QUANT_SIZES[Kind(tensor.kind)]
    rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // per_block * block_bytes)
    return ggml.quants.dequantize(rows, Kind(tensor.kind)).reshape(tensor.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from interleaved rotary order (pairs 2i, 2i+1) to half-split order (i, i + H/2), per head.

    Files of architecture llama hold the interleaved order of the original release; Hugging Face and meetjax split in halves.
    """
    out_features = rows.shape[0]
    pairs = rows.reshape(heads, out_features // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _llama3_scaling(factors: np.ndarray, theta: float, head_width: int, where: str) -> dict[str, Any]:
    """The llama3 rope parameters behind a `rope_freqs` tensor, which holds their effect on each frequency.

    Every released Llama 3 uses low 1, high 4 and 8192 tokens; the factor is the divisor of the lowest frequency. The tensor
    is computed back from them and must agree, otherwise MeetjaxError: a rope that is nearly right is wrong.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_width, 2) / head_width)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - blend) / factor + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise MeetjaxError(
            f"{where}: tensor {ROPE_FREQS}",
            expected=f"the llama3 scaling low 1, high 4, original length 8192, factor {factor:g}",
            found="other values",
            fix="load the Hugging Face folder of this model instead",
        )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _float(value: float) -> float:
    """The shortest decimal that is this float32: 9.9999997e-06 in the header was 1e-05 in config.json."""
    return float(str(np.float32(value)))


def read_gguf_config(header: Header, data: np.ndarray, where: str) -> ModelConfig:
    """`ModelConfig` from the metadata. Raises MeetjaxError for another architecture, a missing key or an unsupported rope."""
    meta, arch = header.meta, header.meta.get("general.architecture")
    if arch not in ("llama", "qwen2"):
        raise MeetjaxError(f"{where}: general.architecture", expected="llama or qwen2", found=arch)

    def need(key: str) -> Any:
        value = meta.get(f"{arch}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MeetjaxError(f"{where}: metadata key {arch}.{key}", expected="a number", found=value if value is None else type(value))
        return value

    if meta.get(f"{arch}.expert_count"):
        raise MeetjaxError(f"{where}: metadata key {arch}.expert_count", expected=0, found=meta[f"{arch}.expert_count"])
    if "token_embd.weight" not in header.tensors:
        raise MeetjaxError(f"{where}: tensor token_embd.weight is missing", fix="use a complete file")
    width, heads = need("embedding_length"), need("attention.head_count")
    head_width = meta.get(f"{arch}.attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(f"{arch}.{key}", head_width) != head_width:
            raise MeetjaxError(f"{where}: metadata key {arch}.{key}", expected=f"the head width {head_width}", found=meta[f"{arch}.{key}"])
    theta = _float(meta.get(f"{arch}.rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_theta": theta}
    factor = meta.get(f"{arch}.rope.scaling.factor") or meta.get(f"{arch}.rope.scale_linear") or 1.0
    kind = meta.get(f"{arch}.rope.scaling.type", "none" if factor == 1.0 else "linear")
    if ROPE_FREQS in header.tensors:
        rope |= _llama3_scaling(dequantise(data, header.tensors[ROPE_FREQS]), theta, head_width, where)
    elif kind != "none":
        rope |= {"rope_type": kind, "factor": _float(factor)}
    window = meta.get(f"{arch}.attention.sliding_window")
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    raw = {
        "model_type": "mistral" if arch == "llama" and window else arch,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": need("attention.head_count_kv") if f"{arch}.attention.head_count_kv" in meta else heads,
        "head_dim": head_width,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _float(need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "sliding_window": window,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
    }
    return configs.from_hf(raw, where)


def tensor_name(site: Site, layer: int | None) -> str:
    """Name of a tensor in GGUF files."""
    return site.gguf if layer is None else f"blk.{layer}.{site.gguf}"


def _check_tensors(config: ModelConfig, header: Header, where: str) -> None:
    expected = {tensor_name(site, None): site for site in sites.top_sites(config).values()}
    for layer in range(config.layers):
        expected |= {tensor_name(site, layer): site for site in sites.block_sites(config).values()}
    for name, site in expected.items():
        if name not in header.tensors:
            raise MeetjaxError(f"{where}: tensor {name} is missing", fix="use a complete file")
        if header.tensors[name].shape != file_shape(config, site):
            raise MeetjaxError(f"{where}: shape of {name}", expected=file_shape(config, site), found=header.tensors[name].shape)
    for name in sorted(header.tensors.keys() - expected.keys() - {ROPE_FREQS}):
        raise MeetjaxError(f"{where}: unexpected tensor {name}", expected=f"only the tensors of a {config.model_type} decoder")


def main_kind(header: Header) -> str:
    """The type most weight matrices have, e.g. "Q4_1"; embeddings are often kept at more bits."""
    counts = Counter(_kind_name(t.kind) for name, t in header.tensors.items() if name.startswith("blk.") and len(t.shape) == 2)
    return counts.most_common(1)[0][0]


def open_file(path: Path, name: str) -> Checkpoint:
    """Opens a GGUF file; tensors are decoded one at a time when read.

    Raises MeetjaxError for a broken file, an unsupported architecture, type, rope or tokenizer, and for tensors that do not fit.
    """
    from meetjax.models.gguf_tokenizer import make_tokenizer

    header, data = read_header(path)
    config = read_gguf_config(header, data, str(path))
    _check_tensors(config, header, str(path))
    heads = {"q": config.heads, "k": config.kv_heads, "q_bias": config.heads, "k_bias": config.kv_heads}
    interleaved = heads if header.meta["general.architecture"] == "llama" else {}

    def read(site: Site, layer: int | None, index: Index) -> np.ndarray:
        tensor = dequantise(data, header.tensors[tensor_name(site, layer)])
        return (unpermute(tensor, interleaved[site.name]) if site.name in interleaved else tensor)[index]

    return Checkpoint(
        f"{name} (GGUF {main_kind(header)})",
        config,
        read,
        sliced=False,
        make_tokenizer=lambda: make_tokenizer(header.meta, config, str(path)),
    )
