"""LoRA and soft prompts in the files of PEFT: `adapter_config.json` beside `adapter_model.safetensors`. No torch, no peft.

PEFT puts a soft prompt in front of everything, BOS included; here it stands behind a leading BOS. The two are one function where the
texts have no BOS, or where the prompt's first vector is the embedding of BOS and the texts are given without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from meetjax.adapters.io import unread
from meetjax.adapters.tree import Bank, Lora, LoraSite, Prompt
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "num_virtual_tokens"}
SILENT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "token_dim", "num_transformer_submodules", "num_attention_heads",
    "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
"""Fields that change nothing in what a trained adapter computes: the tensors show where it acts, and dropout ends with training."""
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start a LoRA that leave the base as it is; the others move a part of its weights into the adapter."""


def write_peft(folder: Path, bank: Bank, config: ModelConfig, base: str) -> None:
    """Writes a bank of one LoRA or of one soft prompt as a PEFT adapter. base: what PEFT shall load under it.

    Raises MeetjaxError for another kind, or for two.
    """
    if bank.lora is not None:
        settings, state = lora_settings(bank.lora), lora_to_peft(bank.lora)
    elif bank.prompt is not None:
        (vectors,) = np.asarray(bank.prompt.vectors)
        settings, state = prompt_settings(config, len(vectors)), {"prompt_embeddings": np.ascontiguousarray(vectors)}
    else:
        raise MeetjaxError("PEFT export", expected="a LoRA or a soft prompt", found="neither")
    settings = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True, **settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def read_peft(folder: Path, config: ModelConfig) -> Bank:
    """A bank of the LoRA or of the soft prompt in a PEFT folder, for a base of this shape.

    Raises MeetjaxError for a missing or broken file, another method, a setting that is not plain LoRA, and tensors that do not fit.
    """
    settings = _read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise MeetjaxError(f"{folder / WEIGHTS}: no such file", fix="save the adapter with safe_serialization; a .bin file can run code")
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise MeetjaxError(f"{folder / WEIGHTS}: not a whole safetensors file", found=error, fix="copy it again") from None
    method = settings.get("peft_type")
    if method == "LORA":
        return Bank(lora=_checked(lora_from_peft(state, _scaling(settings), config.layers), config, folder))
    if method == "PROMPT_TUNING":
        return Bank(prompt=_read_prompt(folder, settings, state, config))
    raise MeetjaxError(f"{folder / CONFIG}: peft_type", expected="LORA or PROMPT_TUNING", found=method)


def lora_settings(lora: Lora) -> dict[str, Any]:
    """PEFT's LoraConfig for `lora_to_peft`'s tensors: rank and alpha of each site, alpha / rank being the scale of all."""
    modules = {name: sites.BLOCK[name].hf.split(".")[1] for name in sites.LINEAR if getattr(lora, name) is not None}
    ranks = {module: getattr(lora, name).a.shape[-1] for name, module in modules.items()}
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": {module: lora.scale * own for module, own in others.items()},
    }


def prompt_settings(config: ModelConfig, length: int) -> dict[str, Any]:
    """PEFT's PromptTuningConfig for a prompt of `length` vectors."""
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": length,
        "token_dim": config.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "prompt_tuning_init": "RANDOM",
    }


def lora_to_peft(lora: Lora) -> dict[str, np.ndarray]:
    """LoRA in PEFT's state-dict names: lora_A (rank, in) and lora_B (out, rank), one tensor a layer. One entry only."""
    if len(lora.entries) != 1:
        raise MeetjaxError("PEFT export", expected="one LoRA", found=f"a bank of {len(lora.entries)}", fix="export them one by one")
    state = {}
    for name in sites.LINEAR:
        if (site := getattr(lora, name)) is None:
            continue
        module = sites.BLOCK[name].hf.removesuffix(".weight")
        for layer in range(site.a.shape[0]):
            path = f"base_model.model.model.layers.{layer}.{module}"
            state[f"{path}.lora_A.weight"] = np.ascontiguousarray(np.asarray(site.a[layer, 0]).T)
            state[f"{path}.lora_B.weight"] = np.ascontiguousarray(np.asarray(site.b[layer, 0]).T)
    return state


def lora_from_peft(state: Mapping[str, np.ndarray], scale: float | Callable[[str, int], float], layers: int | None = None) -> Lora:
    """The inverse of `lora_to_peft`. Raises MeetjaxError for a tensor that is not a LoRA of a known site.

    scale: lora_alpha / r, or a function of (module, its rank) where it differs from module to module; then it goes into b. layers:
    of the base; those that the adapter leaves alone get zeros, as do ranks below the largest of a site. None: it acts in all.
    """
    by_module = {site.hf.removesuffix(".weight"): name for name, site in sites.BLOCK.items() if site.linear}
    found: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for path, tensor in state.items():
        parts = path.removeprefix("base_model.model.").removeprefix("model.layers.").split(".")
        layer, module, matrix = parts[0], ".".join(parts[1:3]), parts[3] if len(parts) > 3 else ""
        if module not in by_module or matrix not in ("lora_A", "lora_B") or not layer.isdigit():
            raise MeetjaxError(f"PEFT tensor {path}", expected="lora_A or lora_B of " + ", ".join(by_module), fix="only plain LoRA is read")
        found.setdefault(by_module[module], {})[int(layer), matrix[-1]] = np.asarray(tensor).astype(np.float32).T
    scales: dict[tuple[str, int], float] = {}
    for name, tensors in found.items():
        own = sorted({layer for layer, _ in tensors})
        if len(tensors) != 2 * len(own) or own[-1] >= (layers or len(own)):
            expected = f"A and B in {'every layer' if layers is None else f'layers of 0 to {layers - 1}'}"
            raise MeetjaxError(f"PEFT LoRA at {name}", expected=expected, found=f"{len(tensors)} tensors in layers {own}")
        for layer in own:
            a, b = tensors[layer, "A"], tensors[layer, "B"]
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
                raise MeetjaxError(f"PEFT LoRA at {name}, layer {layer}", expected="two factors of one rank", found=f"{a.shape}, {b.shape}")
            module = f"model.layers.{layer}.{sites.BLOCK[name].hf.removesuffix('.weight')}"
            scales[name, layer] = scale(module, a.shape[1]) if callable(scale) else scale
    common = next(iter(set(scales.values()))) if len(set(scales.values())) == 1 else None
    fields = {}
    for name, tensors in found.items():
        rank = max(tensor.shape[1] for (_, matrix), tensor in tensors.items() if matrix == "A")
        widths = next((tensors[layer, "A"].shape[0], tensors[layer, "B"].shape[1]) for layer, _ in tensors)
        a, b = (np.zeros((layers or len(tensors) // 2, 1, *shape), np.float32) for shape in ((widths[0], rank), (rank, widths[1])))
        for layer in {layer for layer, _ in tensors}:
            own_a, own_b = tensors[layer, "A"], tensors[layer, "B"]
            if (own_a.shape[0], own_b.shape[1]) != widths:
                raise MeetjaxError(f"PEFT LoRA at {name}", expected=widths, found=f"{own_a.shape}, {own_b.shape} in layer {layer}")
            a[layer, 0, :, : own_a.shape[1]] = own_a
            b[layer, 0, : own_b.shape[0]] = own_b if common is not None else own_b * np.float32(scales[name, layer])
        fields[name] = LoraSite(jnp.asarray(a), jnp.asarray(b))
    return Lora(**fields, scale=1.0 if common is None else common)


def _read_settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises MeetjaxError when it is missing or broken, or says more than a plain adapter does."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text())
        settings.items()
    except OSError as error:
        raise MeetjaxError(f"{path}: {unread(error)}", expected="a PEFT adapter folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise MeetjaxError(f"{path}: not a PEFT config", found=error) from None
    if settings.get("bias", "none") != "none":
        raise MeetjaxError(f"{path}: bias", expected="none", found=settings["bias"], fix="trained biases of the base are no LoRA")
    if settings.get("init_lora_weights") not in HARMLESS_STARTS:
        start, fix = (
            settings["init_lora_weights"],
            "it belongs to a changed base; save it in peft with path_initial_model_for_weight_conversion",
        )
        raise MeetjaxError(f"{path}: init_lora_weights", expected="a start that leaves the base alone", found=start, fix=fix)
    for field in sorted(settings.keys() - READ - SILENT):
        if settings[field]:
            fix = (
                "merge it into its base with peft and load that"
                if field in ("use_dora", "modules_to_save")
                else "only plain adapters are read"
            )
            raise MeetjaxError(f"{path}: {field}", expected="not set", found=settings[field], fix=fix)
    return settings


def _scaling(settings: Mapping[str, Any]) -> Callable[[str, int], float]:
    """(module, its rank) -> what PEFT multiplies its a b with."""
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}

    def scale(module: str, rank: int) -> float:
        # The first pattern that the module's path ends with, as PEFT reads it.
        alpha = next(
            (own for pattern, own in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), settings.get("lora_alpha", 8)
        )
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    return scale


def _checked(lora: Lora, config: ModelConfig, folder: Path) -> Lora:
    if not any(getattr(lora, name) is not None for name in sites.LINEAR):
        raise MeetjaxError(f"{folder / WEIGHTS}: no LoRA tensor", fix="copy the adapter again")
    for name in sites.LINEAR:
        if (site := getattr(lora, name)) is not None:
            found, expected = (site.a.shape[2], site.b.shape[3]), sites.shape(config, sites.BLOCK[name])
            if found != expected:
                raise MeetjaxError(
                    f"{folder / WEIGHTS}: LoRA at {name}", expected=f"{expected}, as the base", found=found, fix="name its base"
                )
            if not np.isfinite([np.abs(site.a).max(), np.abs(site.b).max()]).all():
                raise MeetjaxError(f"{folder / WEIGHTS}: LoRA at {name}", expected="finite numbers", found="NaN or infinity")
    return lora


def _read_prompt(folder: Path, settings: Mapping[str, Any], state: Mapping[str, np.ndarray], config: ModelConfig) -> Prompt:
    expected = (settings.get("num_virtual_tokens"), config.width)
    if set(state) != {"prompt_embeddings"} or state["prompt_embeddings"].shape != expected:
        found = {name: tensor.shape for name, tensor in state.items()}
        raise MeetjaxError(f"{folder / WEIGHTS}", expected=f"prompt_embeddings {expected}, as the config and the base say", found=found)
    vectors = state["prompt_embeddings"].astype(np.float32)
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        expected = "finite vectors, none of them zero, which is an empty slot here"
        raise MeetjaxError(f"{folder / WEIGHTS}: prompt_embeddings", expected=expected, found="NaN, infinity or a zero vector")
    return Prompt(jnp.asarray(vectors)[None])
