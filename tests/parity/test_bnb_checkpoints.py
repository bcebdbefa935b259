"""Weights that bitsandbytes itself has quantised and packed are read as what it says they stand for."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from meetjax.models.load import load
from tests.models.test_load import LLAMA, random_checkpoint, write_folder

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 192, "quantization_config": {"quant_method": "bitsandbytes"}}
ROUNDING = 1e-6
"""Its products are in float32, in another order."""


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_4bit_blocks(tmp_path, kind, double):
    tensors = {name: torch.from_numpy(tensor) for name, tensor in random_checkpoint(WIDE).items()}
    stored, meant = dict(tensors), {}
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            packed, state = bnb.quantize_4bit(tensor, quant_type=kind, compress_statistics=double)
            stored |= {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
            meant[name] = bnb.dequantize_4bit(packed, state).numpy()
    folder = write_folder(tmp_path / "m", WIDE, random_checkpoint(WIDE))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    up = load(folder).params["blocks"]["up"]
    for layer in range(3):
        np.testing.assert_allclose(up[layer], meant[f"model.layers.{layer}.mlp.up_proj.weight"].T, rtol=ROUNDING, atol=ROUNDING)


def test_llm_int8(tmp_path):
    tensors = random_checkpoint(WIDE)
    name = "model.layers.1.mlp.down_proj"
    q, scale, _ = bnb.int8_vectorwise_quant(torch.from_numpy(tensors[f"{name}.weight"]).half())
    expected = bnb.int8_vectorwise_dequant(q, scale).float().numpy()
    stored = tensors | {f"{name}.weight": q.numpy(), f"{name}.SCB": scale.float().numpy(), f"{name}.weight_format": np.zeros((), np.uint8)}
    found = load(write_folder(tmp_path / "m", WIDE, stored)).params["blocks"]["down"][1]
    np.testing.assert_allclose(jnp.asarray(found), expected.T, rtol=ROUNDING, atol=ROUNDING)
