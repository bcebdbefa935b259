"""A bank of fixed shape with room for adapters that come and go. Zeros are neutral for every kind, so an empty place costs its
arithmetic and changes nothing, and to load is to write one place of some arrays: no program is compiled anew.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meetjax.adapters.tree import (
    MERGEABLE,
    Bank,
    Edit,
    EditSite,
    Identity,
    Lora,
    LoraSite,
    column_names,
    count_parameters,
    entry_axis,
    kinds,
)
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import ModelConfig
from meetjax.models.decoder import unstack_bank
from meetjax.types import Array

COUNTS = {"prompt": "prompts", "lora": "loras", "edit": "edits", "identity": "identities"}
"""Kind -> the field of `Room` that says how many fit."""


@dataclasses.dataclass(frozen=True)
class Room:
    """How many adapters of each kind fit, and how large. What there is room for is computed at every step, used or not; 0 costs nothing.

    prompts_at_once: soft prompts that one request may mix (no step pays for soft prompts, only the rows that have them);
    identities: identity blocks of CLM, each costs a block more.
    """

    prompts: int = 8
    prompt_length: int = 32
    prompts_at_once: int = 2
    loras: int = 8
    rank: int = 16
    lora_sites: tuple[str, ...] = ("q", "v")
    edits: int = 8
    edit_sites: tuple[str, ...] = ("down",)
    identities: int = 0
    identity_blocks: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and (value := getattr(self, field.name)) < 0:
                raise MeetjaxError(f"room: {field.name}", expected=">= 0", found=value)
        for kind, allowed in (("lora", sites.LINEAR), ("edit", sites.EDITABLE)):
            if getattr(self, COUNTS[kind]):
                sites.check_sites(f"room: {kind}", getattr(self, f"{kind}_sites"), allowed)


def room_for(banks: Iterable[Bank], spare: int = 2) -> Room:
    """The smallest room that holds these banks and `spare` more adapters of each kind that they have, as large as the largest."""
    counts, at_once = dict.fromkeys(COUNTS, 0), 0
    rank = length = blocks = 0
    lora_sites: set[str] = set()
    edit_sites: set[str] = set()
    for bank in banks:
        for kind in COUNTS:
            tree = getattr(bank, kind)
            counts[kind] += 0 if tree is None else len(tree.entries)
        if bank.prompt is not None:
            length = max(length, bank.prompt.vectors.shape[1])
            at_once = max(at_once, max(bank.prompt.entries.count(entry) for entry in bank.prompt.entries))
        if bank.lora is not None:
            lora_sites |= set(_sites(bank.lora))
            rank = max(rank, *(getattr(bank.lora, name).a.shape[3] for name in _sites(bank.lora)))
        if bank.edit is not None:
            edit_sites |= set(_sites(bank.edit))
        if bank.identity is not None:
            blocks = max(blocks, bank.identity.block["q"].shape[0])
    counts = {kind: count + spare if count else 0 for kind, count in counts.items()}
    return Room(
        counts["prompt"], length, max(2, at_once) if at_once else 0, counts["lora"], rank, _ordered(lora_sites), counts["edit"],
        _ordered(edit_sites), counts["identity"], blocks,
    )  # fmt: skip


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in sites.BLOCK if name in names)


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its kinds, how many numbers were trained, where it came from."""

    kinds: tuple[str, ...]
    parameters: int
    folder: Path


@dataclasses.dataclass
class Loaded:
    """An adapter in its places. uid names this load of it for good; users: open requests; leaving: no new ones are taken."""

    info: AdapterInfo
    places: dict[str, list[int]]
    uid: int
    users: int = 0
    leaving: bool = False


@dataclasses.dataclass(frozen=True)
class Way:
    """One row of an answer: its gates over the bank, its soft prompts (place, strength), the identity block it enters through (-1: none),
    its weight in the mixture, and what names all this for the prefix cache.
    """

    gates: tuple[float, ...]
    prompts: tuple[tuple[int, float], ...]
    enters: int
    weight: float
    name: tuple


class Shelf:
    """The bank, who is where in it, and what a request's strengths mean. Used by one thread at a time."""

    def __init__(self, config: ModelConfig, room: Room):
        self.config, self.room = config, room
        self.free = {kind: list(range(getattr(room, count))) for kind, count in COUNTS.items()}
        self.adapters: dict[str, Loaded] = {}
        self._uids = itertools.count()
        self._leaving: list[Loaded] = []
        stacked, self.vectors = empty_bank(config, room)
        self.bank = unstack_bank(stacked)
        self.first = {"lora": 0, "edit": room.loras}
        self.columns = room.loras + room.edits
        """Gate columns of a row: soft prompts act where its prompt is run, identity blocks by `Way.enters`."""

    def put(self, name: str, folder: Path, bank: Bank) -> None:
        """Writes a bank of one column as `name`, one of several as `name.0`, `name.1`, ... Raises MeetjaxError when it does not fit."""
        moving = [kind for kind in kinds(bank) if kind in COUNTS]
        if not moving:
            raise MeetjaxError(
                f"{folder}: nothing that moves the model", expected=" or ".join(COUNTS), found=" ".join(kinds(bank)) or "nothing"
            )
        names = column_names(name, bank)
        for own in names:
            if own in self.adapters:
                raise MeetjaxError(f"adapter {own} is loaded already", fix="unload it first, or choose another name")
        leaves = {kind: fitted(self.config, self.room, kind, getattr(bank, kind), name) for kind in moving}
        for kind in moving:
            if (need := len(getattr(bank, kind).entries)) > len(self.free[kind]):
                field = COUNTS[kind]
                found = f"{len(self.free[kind])} of {getattr(self.room, field)} are free"
                raise MeetjaxError(
                    f"adapter {name}: no room", expected=f"{need} of {field}", found=found, fix=f"raise Room.{field} or unload one"
                )
        for column, own in enumerate(names):
            places: dict[str, list[int]] = {}
            parameters = 0
            for kind in moving:
                tree, axis = getattr(bank, kind), _place_axis(kind)
                for entry in [i for i, c in enumerate(tree.entries) if c == column]:
                    places.setdefault(kind, []).append(self.free[kind].pop(0))
                    self._write(kind, places[kind][-1], [np.take(leaf, entry, axis) for leaf in leaves[kind]])
                    parameters += count_parameters(tree) // len(tree.entries)
            self.adapters[own] = Loaded(AdapterInfo(tuple(places), parameters, folder), places, next(self._uids))

    def remove(self, name: str) -> None:
        """Takes an adapter out: at once, or when its last user is done."""
        loaded = self.adapters.pop(name, None)
        if loaded is None:
            raise MeetjaxError(f"adapter {name}: not loaded", expected=" or ".join(self.adapters) or "none", found=name)
        loaded.leaving = True
        self._leaving.append(loaded)
        self.sweep()

    def sweep(self) -> None:
        """Empties the places of adapters that left and that nobody uses any more."""
        for loaded in [loaded for loaded in self._leaving if loaded.users == 0]:
            self._leaving.remove(loaded)
            for kind, places in loaded.places.items():
                for place in places:
                    self._empty(kind, place)
                self.free[kind] = sorted(self.free[kind] + places)

    def _empty(self, kind: str, place: int) -> None:
        self._write(kind, place, [np.zeros(np.delete(x.shape, _place_axis(kind)), x.dtype) for x in self._leaves(kind)])

    def _leaves(self, kind: str) -> list[Array]:
        return jax.tree.leaves(self.vectors if kind == "prompt" else getattr(self.bank, kind))

    def _write(self, kind: str, place: int, leaves: list[np.ndarray]) -> None:
        new = write_place(self._leaves(kind), leaves, np.int32(place), _place_axis(kind))
        if kind == "prompt":
            (self.vectors,) = new
        else:
            own = jax.tree.unflatten(jax.tree.structure(getattr(self.bank, kind)), new)
            self.bank = dataclasses.replace(self.bank, **{kind: own})

    def touch(self) -> None:
        """Writes a zero over a zero of every kind, so that `write_place` is compiled."""
        for kind, free in self.free.items():
            if free:
                self._empty(kind, free[0])

    def ways(self, strengths: Sequence[tuple[Loaded, float]], dial: float | None) -> list[Way]:
        """The rows of an answer. z = d (sum_e g_e z_e + (1 - sum_e g_e) z_plain) + (1 - d) z_base over its identity blocks e, as
        `models.streams.make_streams`; what has weight 0 is left out.
        """
        gates = [0.0] * self.columns
        prompts: list[tuple[int, float]] = []
        blocks: list[tuple[int, float, tuple[int, int]]] = []
        name = []
        for loaded, strength in strengths:
            if strength == 0:
                continue
            for kind, places in loaded.places.items():
                for place in places:
                    if kind == "prompt":
                        prompts.append((place, strength))
                    elif kind == "identity":
                        blocks.append((place, strength, (loaded.uid, place)))
                    else:
                        gates[self.first[kind] + place] = strength
            if set(loaded.places) != {"identity"}:
                name.append((loaded.uid, strength))
        if len(prompts) > self.room.prompts_at_once:
            limit = self.room.prompts_at_once
            raise MeetjaxError(
                "adapters: soft prompts", expected=f"at most {limit} at once", found=len(prompts), fix="raise Room.prompts_at_once"
            )
        d, plain = 1.0 if dial is None else dial, 1.0 - sum(strength for _, strength, _ in blocks)
        own, key = (tuple(gates), tuple(prompts)), tuple(sorted(name))
        ways = [Way(*own, place, d * strength, (key, which)) for place, strength, which in blocks]
        ways.append(Way(*own, -1, d * plain, (key, None)))
        base = Way((0.0,) * self.columns, (), -1, 1.0 - d, ((), None))
        if key or d == 0:
            ways.append(base)
        else:
            ways[-1] = dataclasses.replace(ways[-1], weight=ways[-1].weight + base.weight)
        return [way for way in ways if way.weight != 0]


def _place_axis(kind: str) -> int:
    """The axis of places in a leaf of the shelf, which has layers apart."""
    return 0 if kind in MERGEABLE else entry_axis(kind)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def write_place(leaves: list[Array], new: list[Array], place: Array, axis: int) -> list[Array]:
    """The leaves with place `place` of their axis `axis` overwritten."""
    return [jax.lax.dynamic_update_index_in_dim(x, y, place, axis) for x, y in zip(leaves, new, strict=True)]


def _sites(tree: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(tree) if f.name not in ("entries", "scale") and getattr(tree, f.name) is not None]


def empty_bank(config: ModelConfig, room: Room) -> tuple[Bank, Array | None]:
    """(LoRA, edits and identity blocks, all zero; vectors [E, P, D] of soft prompts, which only prompts read)."""
    fields: dict[str, Any] = {}
    if room.loras:
        pairs = {}
        for name in room.lora_sites:
            width, out = sites.shape(config, sites.BLOCK[name])
            shape = (config.layers, room.loras)
            pairs[name] = LoraSite(jnp.zeros((*shape, width, room.rank)), jnp.zeros((*shape, room.rank, out)))
        fields["lora"] = Lora(**pairs, entries=tuple(range(room.loras)))
    if room.edits:
        out = {name: sites.shape(config, sites.BLOCK[name])[1] for name in room.edit_sites}
        vectors = {
            n: EditSite(jnp.zeros((config.layers, room.edits, o)), jnp.zeros((config.layers, room.edits, o))) for n, o in out.items()
        }
        fields["edit"] = Edit(**vectors, entries=tuple(range(room.loras, room.loras + room.edits)))
    if room.identities:
        shape = (room.identity_blocks, room.identities)
        block = {name: jnp.zeros((*shape, *sites.shape(config, site))) for name, site in sites.block_sites(config).items()}
        fields["identity"] = Identity(block, tuple(range(room.identities)))
    return Bank(**fields), jnp.zeros((room.prompts, room.prompt_length, config.width)) if room.prompts else None


def fitted(config: ModelConfig, room: Room, kind: str, tree: Any, name: str) -> list[np.ndarray]:
    """Leaves of one kind, padded with zeros to the room, layers apart, in the order of the shelf's.

    Raises MeetjaxError that names the field of `Room` that is too small.
    """

    def check(ok: bool, field: str, need: object) -> None:
        if not ok:
            raise MeetjaxError(
                f"adapter {name}: {kind} does not fit",
                expected=f"Room.{field} of {need}",
                found=getattr(room, field),
                fix=f"raise Room.{field}",
            )

    check(getattr(room, COUNTS[kind]) > 0, COUNTS[kind], f"{len(tree.entries)} or more")
    if kind == "prompt":
        vectors = np.asarray(tree.vectors, np.float32)
        check(vectors.shape[1] <= room.prompt_length, "prompt_length", vectors.shape[1])
        return [np.pad(vectors, ((0, 0), (0, room.prompt_length - vectors.shape[1]), (0, 0)))]
    if kind == "identity":
        count = tree.block["q"].shape[0]
        check(count <= room.identity_blocks, "identity_blocks", count)
        spare = room.identity_blocks - count
        own = {n: np.pad(np.asarray(leaf, np.float32), ((0, spare),) + ((0, 0),) * (leaf.ndim - 1)) for n, leaf in tree.block.items()}
        return jax.tree.leaves(Identity(own))
    allowed = room.lora_sites if kind == "lora" else room.edit_sites
    used = _sites(tree)
    check(set(used) <= set(allowed), f"{kind}_sites", " ".join(used))
    fields: dict[str, Any] = {}
    for site in allowed:
        given = getattr(tree, site)
        width, out = sites.shape(config, sites.BLOCK[site])
        shape = (config.layers, len(tree.entries))
        if kind == "edit":
            zeros = np.zeros((*shape, out), np.float32)
            fields[site] = EditSite(zeros, zeros) if given is None else EditSite(np.asarray(given.s), np.asarray(given.t))
            continue
        a, b = np.zeros((*shape, width, room.rank), np.float32), np.zeros((*shape, room.rank, out), np.float32)
        if given is not None:
            rank = given.a.shape[3]
            check(rank <= room.rank, "rank", rank)
            a[..., :rank] = given.a
            b[:, :, :rank] = np.asarray(given.b, np.float32) * tree.scale  # the room has no scale of its own
        fields[site] = LoraSite(a, b)
    stacked = jax.tree.leaves(Lora(**fields) if kind == "lora" else Edit(**fields))
    return list(itertools.chain(*stacked))
