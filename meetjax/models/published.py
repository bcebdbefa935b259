"""Shapes of published models by name: what planning needs to know of a model is in its config.json, and no weight."""

from __future__ import annotations

from pathlib import Path

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig, RopeScaling, read_config

_LLAMA1 = {"model_type": "llama", "vocab": 32000, "max_position": 2048, "norm_eps": 1e-6, "bos_token_id": 1, "eos_token_ids": (2,)}
_LLAMA2 = _LLAMA1 | {"max_position": 4096, "norm_eps": 1e-5}
_LLAMA3 = _LLAMA2 | {"vocab": 128256, "max_position": 8192, "rope_theta": 5e5, "bos_token_id": 128000, "eos_token_ids": (128001,)}
_LLAMA31 = _LLAMA3 | {"max_position": 131072, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)}
_LLAMA32 = _LLAMA31 | {"rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), "tied_head": True}
_MISTRAL = _LLAMA2 | {"model_type": "mistral", "max_position": 32768}
_QWEN = {
    "model_type": "qwen2", "vocab": 152064, "max_position": 32768, "norm_eps": 1e-6, "rope_theta": 1e6, "biases": ("k", "q", "v"),
    "bos_token_id": 151643, "eos_token_ids": (151643,),
}  # fmt: skip
_SMALL_QWEN = _QWEN | {"vocab": 151936, "tied_head": True}
_SMOL = _LLAMA2 | {"vocab": 49152, "max_position": 8192, "rope_theta": 1e5, "tied_head": True}

# name -> (what its family shares, width, hidden, layers, heads, kv heads, head width)
_TABLE: dict[str, tuple[dict, int, int, int, int, int, int]] = {
    "llama-7b": (_LLAMA1, 4096, 11008, 32, 32, 32, 128),
    "llama-13b": (_LLAMA1, 5120, 13824, 40, 40, 40, 128),
    "llama-30b": (_LLAMA1, 6656, 17920, 60, 52, 52, 128),
    "llama-65b": (_LLAMA1 | {"norm_eps": 1e-5}, 8192, 22016, 80, 64, 64, 128),
    "llama-2-7b": (_LLAMA2, 4096, 11008, 32, 32, 32, 128),
    "llama-2-13b": (_LLAMA2, 5120, 13824, 40, 40, 40, 128),
    "llama-2-70b": (_LLAMA2, 8192, 28672, 80, 64, 8, 128),
    "llama-3-8b": (_LLAMA3, 4096, 14336, 32, 32, 8, 128),
    "llama-3-70b": (_LLAMA3, 8192, 28672, 80, 64, 8, 128),
    "llama-3.1-8b": (_LLAMA31, 4096, 14336, 32, 32, 8, 128),
    "llama-3.1-70b": (_LLAMA31, 8192, 28672, 80, 64, 8, 128),
    "llama-3.1-405b": (_LLAMA31, 16384, 53248, 126, 128, 8, 128),
    "llama-3.2-1b": (_LLAMA32, 2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": (_LLAMA32, 3072, 8192, 28, 24, 8, 128),
    "mistral-7b-v0.1": (_MISTRAL | {"sliding_window": 4096}, 4096, 14336, 32, 32, 8, 128),
    "mistral-7b-v0.3": (_MISTRAL | {"vocab": 32768, "rope_theta": 1e6}, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-0.5b": (_SMALL_QWEN, 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": (_SMALL_QWEN, 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": (_SMALL_QWEN, 2048, 11008, 36, 16, 2, 128),
    "qwen2.5-7b": (_QWEN, 3584, 18944, 28, 28, 4, 128),
    "qwen2.5-14b": (_QWEN | {"norm_eps": 1e-5}, 5120, 13824, 48, 40, 8, 128),
    "qwen2.5-32b": (_QWEN | {"norm_eps": 1e-5}, 5120, 27648, 64, 40, 8, 128),
    "qwen2.5-72b": (_QWEN | {"norm_eps": 1e-5}, 8192, 29568, 80, 64, 8, 128),
    "smollm2-135m": (_SMOL, 576, 1536, 30, 9, 3, 64),
    "smollm2-360m": (_SMOL, 960, 2560, 32, 15, 5, 64),
    "smollm2-1.7b": (_SMOL | {"rope_theta": 1.3e5}, 2048, 8192, 24, 32, 32, 64),
}
PUBLISHED = {
    name: ModelConfig(width=width, hidden=hidden, layers=layers, heads=heads, kv_heads=kv, head_width=head, **family)
    for name, (family, width, hidden, layers, heads, kv, head) in _TABLE.items()
}


def find_config(name: str) -> ModelConfig:
    """The config of a published model, of a `config.json` or of a folder with one. Raises MeetjaxError for anything else."""
    known = PUBLISHED.get(name.lower().removesuffix("-instruct").removesuffix("-chat"))
    if known is not None:
        return known
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        return read_config(path / "config.json" if path.is_dir() else path)
    raise MeetjaxError("plan: model", expected="a config.json or one of " + ", ".join(PUBLISHED), found=name)
