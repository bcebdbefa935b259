"""LoRA out to peft and back: the same logits there, the same leaves here."""

from __future__ import annotations

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import meetjax
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.peft import lora_from_peft, lora_to_peft
from meetjax.adapters.tree import Bank
from meetjax.data.tokenize import answer_ids

LOGITS_ERROR = 1e-4
"""Of the largest logit: float32 through 30 layers."""
TRAINED = 1e-2
"""Of the largest logit: what the adapter changes at least; otherwise equal logits would only compare the base."""
SPECS = {"all_sites": LoraSpec(rank=16, alpha=32.0), "q_v_only": LoraSpec(rank=3, alpha=4.0, sites=("q", "v"))}

forward = jax.jit(meetjax.apply, static_argnums=0)


def error(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", sorted(SPECS))
def test_peft_export_parity(smollm2, torch_smollm2, pairs, random_lora, peft_config, tmp_path, name):
    tokens = answer_ids(pairs[1], 0, 0)[None]
    lora = random_lora(smollm2.config, SPECS[name])
    ours = np.asarray(forward(smollm2.config, smollm2.params, tokens, Bank(lora=lora)))

    model = peft.get_peft_model(torch_smollm2(), peft_config(SPECS[name])).eval()
    outcome = peft.set_peft_model_state_dict(model, {path: torch.from_numpy(leaf) for path, leaf in lora_to_peft(lora).items()})
    assert not outcome.unexpected_keys
    assert not [path for path in outcome.missing_keys if "lora" in path]
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
        with model.disable_adapter():
            base = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert error(ours, theirs) <= LOGITS_ERROR
    assert error(ours, base) > TRAINED

    model.save_pretrained(tmp_path)
    settings = peft.PeftConfig.from_pretrained(tmp_path)
    back = lora_from_peft(load_file(tmp_path / "adapter_model.safetensors"), settings.lora_alpha / settings.r)
    assert jax.tree.structure(back) == jax.tree.structure(lora)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(lora), strict=True))
