"""An edit's biases as a control vector of llama.cpp: a GGUF file with a tensor `direction.N` for block N.

llama.cpp adds direction N to the residual stream behind block N, which is what a constant at the output of that block's `down`
does. It has no direction 0: what an edit adds behind the first block cannot be said.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np

from meetjax.adapters.tree import Bank, Edit, EditSite
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.models.sites import EDITABLE

FILE = "control-vector.gguf"
TO_MERGED = "export it --to merged, or keep it as an adapter"


def write_control_vector(folder: Path, bank: Bank, config: ModelConfig) -> None:
    """Writes `control-vector.gguf`. Raises MeetjaxError for all that is not biases at `down` behind the blocks after the first."""
    edit = bank.edit
    if edit is None or edit.down is None:
        raise MeetjaxError("control vector", expected="an edit at down", found="none", fix=TO_MERGED)
    for name in EDITABLE:
        site = getattr(edit, name)
        if name != "down" and site is not None and (np.any(site.s) or np.any(site.t)):
            raise MeetjaxError(f"control vector: the edit at {name} acts inside the block", expected="an edit at down alone", fix=TO_MERGED)
    if np.any(edit.down.s):
        what = "control vector: the edit scales the output of down, a control vector only adds"
        raise MeetjaxError(what, expected="s = 0 everywhere", found=f"|s| up to {float(np.abs(edit.down.s).max()):.3g}", fix=TO_MERGED)
    directions = np.asarray(edit.down.t[:, 0], np.float32)
    if directions[0].any():
        what = "control vector: llama.cpp has no direction behind the first block"
        raise MeetjaxError(what, expected="t = 0 there", found=f"|t| up to {float(np.abs(directions[0]).max()):.3g}", fix=TO_MERGED)
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / FILE, "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2" if config.model_type == "qwen2" else "llama")
    writer.add_uint32("controlvector.layer_count", config.layers)
    for layer in range(1, config.layers):
        writer.add_tensor(f"direction.{layer}", directions[layer])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


def read_control_vector(file: Path, config: ModelConfig) -> Bank:
    """The bias-only edit that a control vector is. Raises MeetjaxError for a file that is none, or is of another shape of model."""
    try:
        tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in gguf.GGUFReader(file).tensors}
        directions = {int(name.removeprefix("direction.")): tensor for name, tensor in tensors.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise MeetjaxError(f"{file}: not a control vector", found=error) from None
    t = np.zeros((config.layers, 1, config.width), np.float32)
    for layer, direction in directions.items():
        if not 0 < layer < config.layers or direction.shape != (config.width,):
            expected = f"direction.1 to direction.{config.layers - 1} of width {config.width}"
            raise MeetjaxError(f"{file}", expected=expected, found=f"direction.{layer} {direction.shape}")
        t[layer, 0] = direction
    return Bank(edit=Edit(down=EditSite(jnp.zeros_like(t), jnp.asarray(t))))
