"""Adapters out to what other programs read, and in from peft: nothing is left behind that its own library has not read back."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from meetjax.adapters.algebra import fold, merge_model
from meetjax.adapters.control_vector import FILE as VECTOR
from meetjax.adapters.control_vector import write_control_vector
from meetjax.adapters.io import load_adapters, save_adapters
from meetjax.adapters.peft import read_peft, write_peft
from meetjax.adapters.tree import Bank, Prompt, check_gates, columns, kinds
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import Request, encode
from meetjax.models.load import Model, load
from meetjax.models.save import save_model
from meetjax.models.sources import SMOLLM2, SMOLLM2_HUB
from meetjax.proof import EMBEDS, Proof, prove
from meetjax.types import Array

FORMS = {"peft": ("lora", "prompt"), "merged": ("lora", "edit"), "gguf-vector": ("edit",), "prompt-embeds": ("prompt",)}
"""Form -> the kinds that it can hold."""
SEVERAL = ("merged",)
"""Forms that hold several kinds at once."""


def export_adapter(adapter: Path, form: str, out: Path, source: str = SMOLLM2, strengths: tuple[float, ...] = ()) -> Proof | str:
    """Writes the adapter at a strength into a new folder, in a form of `FORMS`, and returns the proof that its library reads it so.

    source: the base, as for `meetjax.load`. strengths: one for all gate columns, or one a column (none: 1). A soft prompt's first
    vector is the embedding of BOS where the base's texts begin with BOS: readers then leave BOS out of the text, and the two are one
    function. Raises MeetjaxError, with nothing written, for what the form cannot hold and for logits over the tolerance.
    """
    with _new_folder(out) as made:
        model = load(source)
        bank = load_adapters(adapter, model.fingerprint)
        gates = _gates(bank, strengths)
        spare = [kind for kind in kinds(bank) if kind not in FORMS[form]]
        if spare or (len(kinds(bank)) > 1 and form not in SEVERAL):
            expected = (" and " if form in SEVERAL else " or ").join(FORMS[form])
            fix = "export its parts one by one" if not spare else _other_forms(spare[0])
            raise MeetjaxError(f"{adapter}: kinds for --to {form}", expected=expected, found=", ".join(kinds(bank)), fix=fix)
        led = False
        if form == "merged":
            save_model(merge_model(model, bank, gates), made)
        else:
            folded = fold(bank, gates)
            if bank.prompt is not None:
                led = begins_with_bos(model)
                folded = Bank(prompt=_in_front(folded.prompt, model if led else None))
            if form == "peft":
                write_peft(made, folded, model.config, SMOLLM2_HUB if source == SMOLLM2 else str(source))
            elif form == "gguf-vector":
                write_control_vector(made, folded, model.config)
            elif folded.prompt is not None:
                made.mkdir()
                save_file({"prompt_embeds": np.array(folded.prompt.vectors[0])}, made / EMBEDS, metadata={"format": "pt"})
            (made / "README.md").write_text(_note(form, model, gates, bank.prompt is not None, led))
        return prove(form, made, model, bank, gates, made.parent, led=led)


def import_adapter(folder: Path, out: Path, source: str = SMOLLM2) -> Proof | str:
    """Reads a peft LoRA or soft prompt into a new adapter folder for a base, and returns the proof that peft computes the same.

    Raises MeetjaxError, with nothing written, for an adapter that is not plain, does not fit the base or computes something else,
    and for a soft prompt in front of BOS where the base's texts begin with BOS.
    """
    with _new_folder(out) as made:
        model = load(source)
        bank = read_peft(folder, model.config)
        led = bank.prompt is not None and begins_with_bos(model)
        if bank.prompt is not None and led:
            bank = Bank(prompt=_behind_bos(bank.prompt, model, folder))
        save_adapters(made, bank, base=model.name, fingerprint=model.fingerprint, recipe={"imported from": folder.resolve().name})
        return prove("peft", folder, model, bank, (1.0,), made.parent, led=led)


def begins_with_bos(model: Model) -> bool:
    """Whether BOS is the first token of what the base is asked, be it from the tokenizer or from the chat template."""
    bos = model.config.bos_token_id
    return bos is not None and encode(model, Request("a"), "auto", 1)[0] == bos


def _gates(bank: Bank, strengths: tuple[float, ...]) -> tuple[float, ...]:
    width = columns(bank)
    gates = strengths or (1.0,)
    if len(gates) != width:
        raise MeetjaxError("export: --strength", expected=f"one for each of {width} gate columns", found=len(gates))
    check_gates(bank, np.asarray([gates], np.float32), 1)
    return gates


def _other_forms(kind: str) -> str:
    forms = [form for form, held in FORMS.items() if kind in held]
    return f"no form holds {kind}, keep it as an adapter" if not forms else f"{kind} goes --to {' or '.join(forms)}"


def _in_front(prompt: Prompt | None, led_by: Model | None) -> Prompt:
    """The vectors that stand in front of everything, the embedding of BOS first where a model's texts begin with it."""
    if prompt is None:
        raise MeetjaxError("export: a soft prompt at strength 0", expected="one at strength 1", fix="the base alone is that")
    if led_by is None:
        return prompt
    return dataclasses.replace(prompt, vectors=jnp.concatenate([_bos(led_by)[None, None], prompt.vectors], axis=1))


def _bos(model: Model) -> Float[Array, " D"]:
    return model.params["embed"][model.config.bos_token_id].astype(jnp.float32)


def _behind_bos(prompt: Prompt, model: Model, folder: Path) -> Prompt:
    bos = np.asarray(_bos(model))
    if prompt.vectors.shape[1] < 2 or not np.array_equal(np.asarray(prompt.vectors[0, 0]), bos):
        what = f"{folder}: a soft prompt in front of BOS; here it stands behind it, which is another function"
        raise MeetjaxError(what, expected="the embedding of BOS as its first vector", found="another vector", fix="keep it in peft")
    return dataclasses.replace(prompt, vectors=prompt.vectors[:, 1:])


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A place beside `out` that becomes `out` when all has gone well. Raises MeetjaxError where something is there already."""
    out = Path(out).absolute()
    try:
        taken = out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))
        if taken:
            raise MeetjaxError(f"{out}: is there already", expected="a new or an empty folder", fix="choose another --out, or move it away")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            yield Path(scratch) / "made"
            os.replace(Path(scratch) / "made", out)
    except OSError as error:
        raise MeetjaxError(f"{out}: could not be written", found=error, fix="free space or choose another --out") from error


def _note(form: str, model: Model, gates: tuple[float, ...], soft: bool, led: bool) -> str:
    """The README of an exported folder: for which base, how it is read, and when it is exact."""
    how = {
        "peft": "`peft.PeftModel.from_pretrained(base, folder)`",
        "gguf-vector": f"`llama-cli -m base.gguf --control-vector {VECTOR}`",
        "prompt-embeds": f"`prompt_embeds` in `{EMBEDS}`, float32 [vectors, width], goes in front of the embedded text",
    }[form]
    lines = [
        f"Made by meetjax at strength {', '.join(f'{gate:g}' for gate in gates)}.",
        f"Base: {model.name}, {model.fingerprint}.",
        how + ".",
    ]
    if led:
        lines.append(f"The first vector is the embedding of BOS (token {model.config.bos_token_id}): give the text without its BOS.")
    elif soft and model.config.bos_token_id is not None:
        lines.append("A soft prompt is exact for texts that do not begin with BOS.")
    return "\n\n".join(lines) + "\n"
