"""`ModelConfig`: the shape of a Llama-family decoder, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meetjax.errors import MeetjaxError

FAMILIES = {  # model_type -> (has a sliding window, sites with a bias)
    "llama": (False, ()),
    "mistral": (True, ()),
    "qwen2": (True, ("k", "q", "v")),
}
LLAMA_BIASES = {"attention_bias": ("k", "o", "q", "v"), "mlp_bias": ("down", "gate", "up")}
"""Field of a llama's config.json -> the sites that it gives a bias, all together."""
ROPE_SCALINGS = ("default", "linear", "llama3")
REMATS = ("none", "dots", "full")
"""What the forward pass keeps for the backward one: all, what products gave, the residual stream."""
ATTENTIONS = ("xla", "splash", "cudnn")
"""Who computes attention over whole sequences; see `attention.choose_attention`."""
RESIDUALS = ("sequence", "batch")
"""How the residual stream lies on a mesh: rows over the batch axes and tokens over `model`, or rows alone."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is one of `ROPE_SCALINGS`; the rest is read by `linear` and `llama3`."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one decoder; hashable, so it can be a static argument of `jax.jit`.

    Lengths are in tokens. `sliding_window` None means full causal attention; `window_layers` names the layers that use
    the window (None: all). `biases` names the linear sites that have one. The last four say how to compute: `dtype` of activations
    (weights keep theirs), and one of `REMATS`, `ATTENTIONS` and `RESIDUALS`.
    """

    model_type: str
    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    max_position: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tied_head: bool = False
    biases: tuple[str, ...] = ()
    sliding_window: int | None = None
    window_layers: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    residual: str = "sequence"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise MeetjaxError(
                "config field num_key_value_heads",
                expected=f"a divisor of num_attention_heads = {self.heads}",
                found=self.kv_heads,
                fix="correct config.json",
            )
        for field, values in (("remat", REMATS), ("attention", ATTENTIONS), ("residual", RESIDUALS)):
            if getattr(self, field) not in values:
                raise MeetjaxError(f"config field {field}", expected=" or ".join(values), found=getattr(self, field))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name (as in `sites.py`) -> size."""
        return {
            "vocab": self.vocab,
            "embed": self.width,
            "ffn": self.hidden,
            "heads": self.heads * self.head_width,
            "kv": self.kv_heads * self.head_width,
            "layers": self.layers,
        }


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    """(theta, scaling) from either spelling: `rope_parameters` (transformers v5) or `rope_theta` + `rope_scaling`."""
    rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_SCALINGS:
        raise MeetjaxError(
            f"{where}: rope scaling {kind!r} is not supported",
            expected=" or ".join(ROPE_SCALINGS),
            found=kind,
            fix="use a model with one of these, or add the formula to models/layers.py",
        )
    if kind == "default":
        return theta, RopeScaling()
    fields: dict[str, Any] = {"factor": float(rope.get("factor", 1.0))}
    if kind == "llama3":
        for field in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if field not in rope:
                raise MeetjaxError(f"{where}: rope scaling llama3 lacks {field}", fix="complete rope_parameters in config.json")
        fields |= {"low_freq_factor": float(rope["low_freq_factor"]), "high_freq_factor": float(rope["high_freq_factor"])}
        return theta, RopeScaling(kind, original_max_position=int(rope["original_max_position_embeddings"]), **fields)
    return theta, RopeScaling(kind, **fields)


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads the mapping of a Hugging Face `config.json`.

    Raises MeetjaxError for another architecture, a missing field or an unsupported rope scaling or activation.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise MeetjaxError(
            f"{where}: model_type", expected=" or ".join(FAMILIES), found=family, fix="meetjax runs decoders of the Llama family"
        )
    need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for field in need:
        if not isinstance(raw.get(field), int):
            raise MeetjaxError(f"{where}: field {field}", expected="an integer", found=raw.get(field))
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise MeetjaxError(f"{where}: field hidden_act", expected="silu", found=raw["hidden_act"])
    quantised = (raw.get("quantization_config") or {}).get("quant_method")
    if quantised not in (None, "bitsandbytes"):
        fix = "use an unquantised checkpoint, and quantize=int8 or int4 to hold it so"
        raise MeetjaxError(f"{where}: quantization_config.quant_method", expected="bitsandbytes or none", found=quantised, fix=fix)
    windowed, biases = FAMILIES[family]
    if family == "llama":
        biases += tuple(site for field, group in LLAMA_BIASES.items() if raw.get(field) for site in group)
    window = raw.get("sliding_window") if windowed and (family != "qwen2" or raw.get("use_sliding_window")) else None
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    window_layers = None
    if window and family == "qwen2":
        kinds = raw.get("layer_types") or [
            "sliding_attention" if i >= raw.get("max_window_layers", 28) else "full_attention" for i in range(layers)
        ]
        window_layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        if len(window_layers) == layers:
            window_layers = None
    eos = raw.get("eos_token_id")
    theta, scaling = _rope(raw, where)
    return ModelConfig(
        model_type=family,
        vocab=raw["vocab_size"],
        width=raw["hidden_size"],
        hidden=raw["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_width=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_position=raw.get("max_position_embeddings", 2048),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        biases=tuple(sorted(biases)),
        sliding_window=window,
        window_layers=window_layers,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: a mapping for `config.json`, in the spelling of rope that old and new transformers read.

    What says how to compute is in no file. Raises MeetjaxError for what the format has no field for.
    """
    rope = config.rope_scaling
    raw: dict[str, Any] = {
        "architectures": [config.model_type.capitalize() + "ForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope.kind == "default" else {"rope_type": rope.kind, "factor": rope.factor},
        "tie_word_embeddings": config.tied_head,
        # Said also where there is none: transformers has defaults of its own for a token or a window that is left out.
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not config.eos_token_ids else list(config.eos_token_ids),
    }
    if rope.kind == "llama3":
        raw["rope_scaling"] |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    if config.model_type == "llama":
        raw |= {field: set(group) <= set(config.biases) for field, group in LLAMA_BIASES.items()}
    else:
        raw["sliding_window"] = config.sliding_window
    if config.model_type == "qwen2":
        raw["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:
            inside = range(config.layers) if config.window_layers is None else config.window_layers
            raw["layer_types"] = ["sliding_attention" if i in inside else "full_attention" for i in range(config.layers)]
    how = {field: getattr(config, field) for field in ("dtype", "remat", "attention", "residual")}
    read = dataclasses.replace(from_hf(raw, "config"), **how)
    for field in dataclasses.fields(config):
        said, meant = getattr(read, field.name), getattr(config, field.name)
        if said != meant:
            what = f"config: a config.json of {config.model_type} cannot say {field.name}"
            raise MeetjaxError(what, expected=said, found=meant, fix="this model cannot be written as a Hugging Face folder")
    return raw


def read_config(path: str | Path) -> ModelConfig:
    """Reads a `config.json` file. Raises MeetjaxError when it is missing, not JSON, or not a supported model."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise MeetjaxError(f"{path}: no such file", fix="point at a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise MeetjaxError(f"{path}:{error.lineno}: not JSON", found=error.msg) from None
    return from_hf(raw, str(path))
