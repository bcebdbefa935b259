"""Arithmetic on adapters: scale, mix, stack into a bank, merge into the base. All exact; what is not exact is not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from meetjax.adapters.tree import (
    KINDS,
    MERGEABLE,
    Bank,
    Edit,
    EditSite,
    Identity,
    Lora,
    LoraSite,
    Prompt,
    Reward,
    columns,
    entry_axis,
    kinds,
)
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.models.fingerprint import fingerprint
from meetjax.models.load import Model
from meetjax.models.quant import dequantize_params
from meetjax.types import Params


def scale(bank: Bank, strength: float) -> Bank:
    """The bank whose gate 1 acts as gate `strength` of this one. Raises MeetjaxError for prompts and identity blocks.

    Those two are not linear in their leaves: dial them with gates or the logit dial instead.
    """
    for kind in ("prompt", "identity"):
        if getattr(bank, kind) is not None and strength != 1:
            raise MeetjaxError(f"scale: {kind} cannot be scaled in its leaves", fix="use gates or the logit dial")
    lora = bank.lora and _each_site(bank.lora, lambda site: LoraSite(site.a, site.b * strength))
    edit = bank.edit and _each_site(bank.edit, lambda site: EditSite(site.s * strength, site.t * strength))
    reward = bank.reward and dataclasses.replace(bank.reward, u=bank.reward.u * strength)
    return dataclasses.replace(bank, lora=lora, edit=edit, reward=reward)


def at_strength(bank: Bank, *strengths: float) -> tuple[tuple[float, ...], float | None]:
    """(gates of a row, logit dial) that set each gate column of a bank to its strength: 0 is the base, 1 the trained adapter.

    In the weights where that is defined everywhere, any real number; in the logits for one column with a soft prompt, whose gate has
    a logarithm. Raises MeetjaxError for another number of strengths: what was trained apart (MEET's bad and good control) was
    never meant to act at once.
    """
    if len(strengths) != (width := columns(bank)):
        fix = f"0 for all but one of them, such as {' '.join(['0'] * (width - 1) + ['1'])}"
        raise MeetjaxError("strength", expected=f"{width}, one for each gate column of the adapter", found=len(strengths), fix=fix)
    if bank.prompt is not None and len(strengths) == 1:
        return (1.0,), strengths[0]
    return strengths, None


def apart(bank: Bank) -> list[Bank]:
    """A bank of one gate column for each column of this one, in their order."""
    return [_column(bank, column) for column in range(columns(bank))]


def _column(bank: Bank, column: int) -> Bank:
    fields = {}
    for kind in kinds(bank):
        tree = getattr(bank, kind)
        own = [i for i, c in enumerate(tree.entries) if c == column]
        if own:
            taken = jax.tree.map(lambda leaf, kind=kind, own=own: jnp.take(leaf, jnp.asarray(own), entry_axis(kind)), tree)
            fields[kind] = dataclasses.replace(taken, entries=(0,) * len(own))
    return Bank(**fields)


def stack(banks: Sequence[Bank]) -> Bank:
    """One bank with the gate columns of all, in order. Ranks and prompt lengths are padded with neutral zeros.

    LoRA scales are folded into b where they differ. Raises MeetjaxError for no bank or for adapters of different models.
    """
    if not banks:
        raise MeetjaxError("stack: no bank", expected="at least one")
    offsets, total = [], 0
    for bank in banks:
        offsets.append(total)
        total += columns(bank)
    fields = {}
    for kind in KINDS:
        trees = [
            dataclasses.replace(getattr(bank, kind), entries=tuple(e + offset for e in getattr(bank, kind).entries))
            for bank, offset in zip(banks, offsets, strict=True)
            if getattr(bank, kind) is not None
        ]
        if trees:
            try:
                fields[kind] = _STACK[kind](trees)
                if kind in ("lora", "edit"):
                    _check_depth(fields[kind])
            except (TypeError, ValueError) as error:
                fix = "stack adapters of one base model"
                raise MeetjaxError(f"stack: {kind} adapters do not fit together", found=error, fix=fix) from error
    return Bank(**fields)


def mix(banks: Sequence[Bank], weights: Sequence[float]) -> Bank:
    """One gate column that acts as sum_i w_i bank_i: edits add, LoRAs are concatenated along the rank, never interpolated."""
    if len(banks) != len(weights):
        raise MeetjaxError("mix: weights", expected=f"{len(banks)}, one a bank", found=len(weights))
    stacked = stack([scale(bank, weight) for bank, weight in zip(banks, weights, strict=True)])
    return jax.tree.map(
        lambda tree: dataclasses.replace(tree, entries=(0,) * len(tree.entries)),
        stacked,
        is_leaf=lambda node: hasattr(node, "entries"),
    )


def fold(bank: Bank, gates: Sequence[float]) -> Bank:
    """A bank of one adapter a kind that acts at gate 1 as this one does at `gates`, one a column.

    LoRAs are concatenated along the rank with their gates in b, edits add, and of soft prompts the one that is on is left, without
    its empty slots. Raises MeetjaxError for a soft prompt between off and on, for two that are on, and for identity and reward.
    """
    for kind in ("identity", "reward"):
        if getattr(bank, kind) is not None:
            raise MeetjaxError(f"fold: {kind}", expected="lora, edit or prompt", fix=f"keep {kind} as an adapter")
    lora, edit, prompt = bank.lora, bank.edit, None
    if lora is not None:
        strength = jnp.asarray([gates[entry] for entry in lora.entries], jnp.float32)[None, :, None, None]

        def whole(site: LoraSite) -> LoraSite:
            a, b = jnp.moveaxis(site.a, 1, 2), site.b * strength
            return LoraSite(a.reshape(*a.shape[:2], -1)[:, None], b.reshape(b.shape[0], 1, -1, b.shape[3]))

        lora = dataclasses.replace(_each_site(lora, whole), entries=(0,))
    if edit is not None:
        strength = jnp.asarray([gates[entry] for entry in edit.entries], jnp.float32)[None, :, None]
        total = _each_site(edit, lambda site: EditSite(*(jnp.sum(v * strength, axis=1, keepdims=True) for v in (site.s, site.t))))
        edit = dataclasses.replace(total, entries=(0,))
    if bank.prompt is not None:
        on = [(i, gates[entry]) for i, entry in enumerate(bank.prompt.entries) if gates[entry] != 0]
        if [gate for _, gate in on] not in ([], [1.0]):
            what = "fold: a soft prompt is whole or not there (its gate is in the attention, not in its vectors)"
            raise MeetjaxError(what, expected="one at strength 1", found=[gate for _, gate in on], fix="keep it as an adapter")
        for i, _ in on:
            vectors = bank.prompt.vectors[i]
            prompt = Prompt(vectors[jnp.any(vectors != 0, axis=1)][None])
    return Bank(prompt=prompt, lora=lora, edit=edit)


def merge(config: ModelConfig, params: Params, bank: Bank, gates: Sequence[float] | None = None) -> tuple[ModelConfig, Params]:
    """The base with LoRA and edits folded in: W' = (W + g scale a b) diag(1 + g s), b' = b (1 + g s) + g t.

    Returns a config too: an edit adds biases to its sites. A quantised base comes back dequantised: what is merged into integers would
    mostly be rounded away. Raises MeetjaxError for kinds that are not part of a linear layer.
    """
    for kind in kinds(bank):
        if kind not in MERGEABLE:
            raise MeetjaxError(f"merge: {kind} is not part of a linear layer", expected="lora or edit", fix=f"keep {kind} as an adapter")
    strengths = jnp.ones(columns(bank)) if gates is None else jnp.asarray(gates, jnp.float32)
    params = dequantize_params(params)
    blocks, biases = dict(params["blocks"]), set(config.biases)
    for name in sites.LINEAR:
        weight = blocks[name].astype(jnp.float32)
        if bank.lora is not None and (low_rank := getattr(bank.lora, name)) is not None:
            strength = strengths[jnp.asarray(bank.lora.entries)] * bank.lora.scale
            weight = weight + jnp.einsum("leir,lero,e->lio", low_rank.a, low_rank.b, strength)
        if bank.edit is not None and (vectors := getattr(bank.edit, name, None)) is not None:
            strength = strengths[jnp.asarray(bank.edit.entries)]
            s, t = (jnp.einsum("leo,e->lo", v, strength) for v in (vectors.s, vectors.t))
            weight = weight * (1 + s)[:, None]
            bias = blocks[f"{name}_bias"].astype(jnp.float32) * (1 + s) if name in biases else 0.0
            blocks[f"{name}_bias"] = (bias + t).astype(params["blocks"][name].dtype)
            biases.add(name)
        blocks[name] = weight.astype(params["blocks"][name].dtype)
    return dataclasses.replace(config, biases=tuple(sorted(biases))), params | {"blocks": blocks}


def merge_model(model: Model, bank: Bank, gates: Sequence[float] | None = None) -> Model:
    """`merge` for a whole model, under the identity that the merged weights have: what `save_model` writes."""
    config, params = merge(model.config, model.params, bank, gates)
    return dataclasses.replace(model, config=config, params=params, fingerprint=fingerprint(config, params), quantize="none")


def _site_names(tree: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(tree) if field.name not in ("entries", "scale") and getattr(tree, field.name)]


def _each_site(tree: Any, function) -> Any:
    return dataclasses.replace(tree, **{name: function(getattr(tree, name)) for name in _site_names(tree)})


def _entries(trees: Sequence[Any]) -> tuple[int, ...]:
    return sum((tree.entries for tree in trees), ())


def _stack_prompts(trees: Sequence[Prompt]) -> Prompt:
    length = max(tree.vectors.shape[1] for tree in trees)
    padded = [jnp.pad(tree.vectors, ((0, 0), (0, length - tree.vectors.shape[1]), (0, 0))) for tree in trees]
    return Prompt(jnp.concatenate(padded), _entries(trees))


def _stack_loras(trees: Sequence[Lora]) -> Lora:
    if len({tree.scale for tree in trees}) > 1:
        trees = [dataclasses.replace(_each_site(t, lambda s, t=t: LoraSite(s.a, s.b * t.scale)), scale=1.0) for t in trees]
    rank = max(getattr(tree, name).a.shape[-1] for tree in trees for name in _site_names(tree))

    def whole(tree: Lora, name: str) -> LoraSite:
        site = getattr(tree, name)
        if site is None:
            like = next(getattr(t, name) for t in trees if getattr(t, name) is not None)
            shape_a, shape_b = like.a.shape, like.b.shape
            count = len(tree.entries)
            return LoraSite(jnp.zeros((shape_a[0], count, shape_a[2], rank)), jnp.zeros((shape_b[0], count, rank, shape_b[3])))
        spare = rank - site.a.shape[-1]
        return LoraSite(jnp.pad(site.a, ((0, 0),) * 3 + ((0, spare),)), jnp.pad(site.b, ((0, 0), (0, 0), (0, spare), (0, 0))))

    names = sorted({name for tree in trees for name in _site_names(tree)})
    return Lora(**{name: _concatenate([whole(t, name) for t in trees], 1) for name in names}, scale=trees[0].scale, entries=_entries(trees))


def _stack_edits(trees: Sequence[Edit]) -> Edit:
    def whole(tree: Edit, name: str) -> EditSite:
        like = next(getattr(t, name) for t in trees if getattr(t, name) is not None)
        zeros = jnp.zeros((like.s.shape[0], len(tree.entries), like.s.shape[2]))
        return getattr(tree, name) or EditSite(zeros, zeros)

    names = sorted({name for tree in trees for name in _site_names(tree)})
    return Edit(**{name: _concatenate([whole(t, name) for t in trees], 1) for name in names}, entries=_entries(trees))


def _stack_identities(trees: Sequence[Identity]) -> Identity:
    return Identity(_concatenate([tree.block for tree in trees], 1), _entries(trees))


def _stack_rewards(trees: Sequence[Reward]) -> Reward:
    return Reward(jnp.concatenate([tree.u for tree in trees]), _entries(trees))


def _check_depth(tree: Any) -> None:
    """Raises ValueError where sites differ in their number of layers; sites that no two trees share meet nowhere else."""
    depths = sorted({leaf.shape[0] for leaf in jax.tree.leaves(tree)})
    if len(depths) > 1:
        raise ValueError(f"sites with {' and '.join(map(str, depths))} layers")


def _concatenate(trees: Sequence[Any], axis: int) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *trees)


_STACK = {"prompt": _stack_prompts, "lora": _stack_loras, "edit": _stack_edits, "identity": _stack_identities, "reward": _stack_rewards}
