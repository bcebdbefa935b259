"""Making a bank of one adapter, of any subset of kinds, from specs."""

from __future__ import annotations

import dataclasses

import jax

from meetjax.adapters.edit import EditSpec, init_edit
from meetjax.adapters.identity import IdentitySpec, init_identity
from meetjax.adapters.lora import LoraSpec, init_lora
from meetjax.adapters.prompt import PromptSpec, init_prompt
from meetjax.adapters.reward import RewardSpec, init_reward
from meetjax.adapters.tree import Bank
from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.types import Array, Params

Spec = PromptSpec | LoraSpec | EditSpec | IdentitySpec | RewardSpec
KIND_OF = {PromptSpec: "prompt", LoraSpec: "lora", EditSpec: "edit", IdentitySpec: "identity", RewardSpec: "reward"}


def init_bank(config: ModelConfig, params: Params, specs: tuple[Spec, ...], tokenizer, key: Array, columns: int = 1) -> Bank:
    """A bank with an adapter of each spec for every gate column. Only a soft prompt moves the model at once; the rest start as the base.

    tokenizer: encodes the prompt's starting text. Raises MeetjaxError for no spec, two of a kind, or a bad site, rank, length or text.
    """
    if not specs:
        raise MeetjaxError("adapters: zero trainable leaves", expected="at least one of " + ", ".join(KIND_OF.values()), found="none")
    fields = {}
    for spec in specs:
        kind = KIND_OF.get(type(spec))
        if kind is None or kind in fields:
            raise MeetjaxError("adapters", expected="one spec a kind: " + ", ".join(KIND_OF.values()), found=repr(spec))
        if isinstance(spec, PromptSpec):
            texts = (spec.text,) * columns if isinstance(spec.text, str) else spec.text
            if len(texts) != columns:
                raise MeetjaxError("prompt: text", expected=f"one text, or one for each of {columns} columns", found=len(texts))
            fields[kind] = init_prompt(params, spec, [tokenizer.encode(text, add_special_tokens=False) for text in texts])
        elif isinstance(spec, LoraSpec):
            fields[kind] = init_lora(config, spec, jax.random.fold_in(key, 1), columns)
        elif isinstance(spec, EditSpec):
            fields[kind] = init_edit(config, spec, columns)
        elif isinstance(spec, IdentitySpec):
            fields[kind] = init_identity(config, params, spec, columns)
        else:
            fields[kind] = init_reward(config, columns)
        fields[kind] = dataclasses.replace(fields[kind], entries=tuple(range(columns)))
    return Bank(**fields)
