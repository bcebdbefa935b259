"""What another library makes of an adapter's files, beside what the adapter is here: the largest difference in the logits."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from meetjax.adapters.control_vector import FILE as VECTOR
from meetjax.adapters.control_vector import read_control_vector
from meetjax.adapters.tree import Bank
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import Request, encode
from meetjax.models.decoder import apply
from meetjax.models.load import Model
from meetjax.models.save import save_model

TOLERANCE = 1e-4
"""Of the largest logit: float32 through tens of layers, summed in another order."""
TEXTS = ("Name three uses of a brick.", "Why is the sky blue? Answer in one sentence, please.")
EMBEDS = "prompt_embeds.safetensors"

forward = jax.jit(apply, static_argnums=0)
Reader = Callable[[np.ndarray], np.ndarray]
"""int64[T] tokens -> float32[T, V] logits."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """max |ours - theirs| over all logits of `tokens` positions; largest: max |theirs|; moved: max |ours - base|, what the adapter does."""

    reader: str
    difference: float
    largest: float
    moved: float
    tokens: int

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE * self.largest

    def __str__(self) -> str:
        return (
            f"{self.reader}: largest logit difference {self.difference:.2e}, {self.difference / self.largest:.1e} of the largest logit "
            f"(tolerance {TOLERANCE:.0e}), over {self.tokens} tokens that the adapter moves by up to {self.moved:.3g}"
        )


def prove(form: str, folder: Path, model: Model, bank: Bank, gates: tuple[float, ...], scratch: Path, *, led: bool = False) -> Proof | str:
    """The proof for files of a form in `folder`, or one line that says which package is missing for it.

    bank, gates: the adapter as it is here. scratch: a folder for the base, in the form that the library reads. led: the files hold
    the embedding of BOS, so their reader gets texts without it. Raises MeetjaxError when the difference is over the tolerance, and
    for files that the library does not read.
    """
    needs = {"peft": ("torch", "peft"), "gguf-vector": ()}.get(form, ("torch",))
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        return f"not proved: {' and '.join(missing)} not installed, so nothing has read the files back (pip install {' '.join(missing)})"
    texts = [encode(model, Request(text), "auto", 1) for text in TEXTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say of themselves
        try:
            name, theirs = READERS[form](folder, model, scratch)
            found = [theirs(np.asarray(ids[led:], np.int64)) for ids in texts]
        except MeetjaxError:
            raise
        except Exception as error:  # another library's, which may be any
            raise MeetjaxError(f"{folder}: {form} cannot be read back", found=f"{type(error).__name__}: {error}"[:300]) from error
    row = np.asarray([gates], np.float32)
    with jax.default_matmul_precision("highest"):  # an accelerator would round what it multiplies
        ours, base = (
            [np.asarray(forward(model.config, model.params, np.asarray([ids], np.int32), *own)[0, led:]) for ids in texts]
            for own in ((bank, row), (None, None))
        )
    proof = Proof(
        name,
        difference=_apart(ours, found),
        largest=max(float(np.abs(logits).max()) for logits in found),
        moved=_apart(ours, base),
        tokens=sum(len(logits) for logits in found),
    )
    if not proof.holds:
        raise MeetjaxError(f"{form}: {name} computes other logits", expected=f"at most {TOLERANCE:.0e} of the largest", found=proof)
    return proof


def _apart(left: list[Float[np.ndarray, "T V"]], right: list[Float[np.ndarray, "T V"]]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _transformers(folder: Path) -> tuple[str, Any]:
    """(name, a torch model of a folder in float32)."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager", local_files_only=True)
    return f"transformers {version('transformers')}", net.eval()


def _run(net: Any, **inputs: np.ndarray) -> np.ndarray:
    torch: Any = importlib.import_module("torch")
    with torch.no_grad():
        return net(**{name: torch.from_numpy(value[None]) for name, value in inputs.items()}, use_cache=False).logits[0].float().numpy()


def _read_peft(folder: Path, model: Model, scratch: Path) -> tuple[str, Reader]:
    peft: Any = importlib.import_module("peft")
    net = peft.PeftModel.from_pretrained(_transformers(save_model(model, scratch / "base"))[1], str(folder)).eval()
    return f"peft {version('peft')}", lambda ids: _run(net, input_ids=ids)[-len(ids) :]


def _read_merged(folder: Path, model: Model, scratch: Path) -> tuple[str, Reader]:
    name, net = _transformers(folder)
    return name, lambda ids: _run(net, input_ids=ids)


def _read_embeds(folder: Path, model: Model, scratch: Path) -> tuple[str, Reader]:
    name, net = _transformers(save_model(model, scratch / "base"))
    soft = load_file(folder / EMBEDS)["prompt_embeds"]
    table = net.get_input_embeddings().weight.detach().numpy()
    return f"{name} on inputs_embeds", lambda ids: _run(net, inputs_embeds=np.concatenate([soft, table[ids]]))[-len(ids) :]


def _read_vector(folder: Path, model: Model, scratch: Path) -> tuple[str, Reader]:
    """As llama.cpp applies it: direction N is added to the residual stream behind block N."""
    if importlib.util.find_spec("torch") is None:
        bank = read_control_vector(folder / VECTOR, model.config)
        return f"gguf {version('gguf')}", lambda ids: np.asarray(forward(model.config, model.params, ids[None].astype(np.int32), bank)[0])
    torch: Any = importlib.import_module("torch")
    name, net = _transformers(save_model(model, scratch / "base"))
    for tensor in gguf.GGUFReader(folder / VECTOR).tensors:
        direction = torch.from_numpy(np.array(tensor.data))
        block = net.model.layers[int(tensor.name.removeprefix("direction."))]
        block.register_forward_hook(lambda module, args, output, direction=direction: output + direction)
    return f"gguf {version('gguf')}, added behind each block by {name}", lambda ids: _run(net, input_ids=ids)


READERS = {"peft": _read_peft, "merged": _read_merged, "gguf-vector": _read_vector, "prompt-embeds": _read_embeds}
