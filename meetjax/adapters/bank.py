"""Making a bank of one adapter, of any subset of kinds, from specs."""

from __future__ import annotations

import jax

from meetjax.adapters.edit import EditSpec, init_edit
from meetjax.adapters.identity import IdentitySpec, init_identity
from meetjax.adapters.lora import LoraSpec, init_lora
from meetjax.adapters.prompt import PromptSpec, init_prompt
from meetjax.adapters.tree import Bank
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.types import Array, Params

Spec = PromptSpec | LoraSpec | EditSpec | IdentitySpec
KIND_OF = {PromptSpec: "prompt", LoraSpec: "lora", EditSpec: "edit", IdentitySpec: "identity"}


def init_bank(config: ModelConfig, params: Params, specs: tuple[Spec, ...], tokenizer, key: Array) -> Bank:
    """A bank with one gate column. Only a soft prompt moves the model at once; the other kinds start as the base.

    tokenizer: encodes the prompt's starting text. Raises MeetjaxError for no spec, two of a kind, or a bad site, rank or length.
    """
    if not specs:
        raise MeetjaxError("adapters: zero trainable leaves", expected="at least one of prompt, lora, edit, identity", found="none")
    fields = {}
    for spec in specs:
        kind = KIND_OF.get(type(spec))
        if kind is None or kind in fields:
            raise MeetjaxError("adapters", expected="one spec a kind: " + ", ".join(KIND_OF.values()), found=repr(spec))
        if isinstance(spec, PromptSpec):
            fields[kind] = init_prompt(config, params, spec, tokenizer.encode(spec.text, add_special_tokens=False))
        elif isinstance(spec, LoraSpec):
            fields[kind] = init_lora(config, spec, jax.random.fold_in(key, 1))
        elif isinstance(spec, EditSpec):
            fields[kind] = init_edit(config, spec)
        else:
            fields[kind] = init_identity(config, params, spec)
    return Bank(**fields)
