"""Checkpoints of bitsandbytes: files written here from the published format are read as what they were rounded to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from meetjax.errors import MeetjaxError
from meetjax.models.load import load
from tests.models.test_load import LLAMA, QWEN2, random_checkpoint, write_folder

NF4 = np.array(
    [-1, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1],
    np.float32,
)  # fmt: skip
"""Quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""
BLOCK, NESTED = 8, 4
"""Numbers to a scale and scales to a scale of scales; the library's are 64 and 256, too large for a tiny model to have two."""
Q = "model.layers.1.self_attn.q_proj"


def encode_4bit(name, tensor, nested=True, storage=np.uint8):
    """(the tensors of one weight, the numbers that they stand for)."""
    blocks = tensor.astype(np.float32).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(1)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(tensor.shape)}
    parts = {"absmax": absmax, "quant_map": NF4}
    if nested:
        table, offset = np.linspace(-1, 1, 256).astype(np.float32), float(absmax.mean())
        rest = (absmax - np.float32(offset)).reshape(-1, NESTED)
        outer = np.abs(rest).max(1)
        codes = np.abs((rest / outer[:, None])[..., None] - table).argmin(-1).astype(np.uint8)
        absmax = (table[codes] * outer[:, None] + np.float32(offset)).reshape(-1)
        parts |= {"absmax": codes.reshape(-1), "nested_absmax": outer, "nested_quant_map": table}
        state |= {"nested_blocksize": NESTED, "nested_offset": offset, "nested_dtype": "float32"}
    codes = np.abs((blocks / absmax[:, None])[..., None] - NF4).argmin(-1).astype(np.uint8)
    flat = codes.reshape(-1)
    packed = ((flat[0::2] << 4) | flat[1::2]).view(storage)[:, None]
    tensors = {f"{name}.{part}": value for part, value in parts.items()} | {name: packed}
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors, (NF4[codes] * absmax[:, None]).reshape(tensor.shape)


def encode_8bit(name, tensor):
    scale = np.abs(tensor).max(1)
    q = np.round(tensor / scale[:, None] * 127).astype(np.int8)
    module = name.removesuffix("weight")
    return {name: q, module + "SCB": scale, module + "weight_format": np.zeros((), np.uint8)}, q * (scale / np.float32(127))[:, None]


def quantise(tensors, encode, kept=()):
    """(the checkpoint with its linear weights encoded, the same with the numbers that these stand for)."""
    stored, meant = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if "_proj.weight" in name and name not in kept:
            made, meant[name] = encode(name, tensor)
            stored |= made
    return stored, meant


def assert_read_as(folder, raw, stored, meant):
    plain = load(write_folder(folder / "plain", raw, meant))
    found = load(write_folder(folder / "quantised", raw | {"quantization_config": {"quant_method": "bitsandbytes"}}, stored))
    for name, leaf in plain.params["blocks"].items():
        np.testing.assert_allclose(found.params["blocks"][name], leaf, rtol=1e-6, atol=1e-7, err_msg=name)
    assert found.fingerprint == plain.fingerprint


@pytest.mark.parametrize(("nested", "storage"), [(True, np.uint8), (False, np.float16)], ids=["double", "single"])
def test_4bit_blocks(tmp_path, nested, storage):
    """A weight that the config left out stays as it is; codes may be stored as floats, whose values mean nothing."""
    tensors = random_checkpoint(QWEN2)
    stored, meant = quantise(tensors, lambda name, tensor: encode_4bit(name, tensor, nested, storage), kept=(f"{Q}.weight",))
    assert stored[f"{Q}.weight"].dtype == np.float32
    assert_read_as(tmp_path, QWEN2, stored, meant)


def test_llm_int8(tmp_path):
    assert_read_as(tmp_path, LLAMA, *quantise(random_checkpoint(LLAMA), encode_8bit))


def test_errors_name_the_tensor(tmp_path):
    four, _ = quantise(random_checkpoint(LLAMA), encode_4bit)
    eight, _ = quantise(random_checkpoint(LLAMA), encode_8bit)
    bare = dict(four)
    bare.pop(f"{Q}.weight.absmax")
    cases = {
        f"tensor {Q}.weight.absmax is missing": bare,
        f"tensor {Q}.weight.quant_map: size; expected 16; found 8": four | {f"{Q}.weight.quant_map": NF4[:8]},
        "bytes; expected 128; found 127": four | {f"{Q}.weight": four[f"{Q}.weight"][1:]},
        "quantisation state": four | {f"{Q}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{}", np.uint8)},
        f"tensor {Q}.SCB: size; expected 16; found 3": eight | {f"{Q}.SCB": eight[f"{Q}.SCB"][:3]},
        f"{Q}.weight; expected a matrix of int8": eight | {f"{Q}.weight": random_checkpoint(LLAMA)[f"{Q}.weight"]},
    }
    for number, (what, tensors) in enumerate(cases.items()):
        with pytest.raises(MeetjaxError) as caught:
            load(write_folder(tmp_path / str(number), LLAMA, tensors))
        assert what in str(caught.value) and Q in str(caught.value), caught.value


def test_other_quantisers_are_named(tmp_path):
    raw = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(MeetjaxError, match=r"quantization_config\.quant_method; expected bitsandbytes or none; found gptq"):
        load(write_folder(tmp_path / "m", raw, random_checkpoint(LLAMA)))
