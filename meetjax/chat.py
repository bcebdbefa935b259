"""A conversation in the terminal, with a dial for every adapter."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from meetjax.adapters.algebra import apart, stack
from meetjax.adapters.io import load_adapters
from meetjax.adapters.tree import Bank, check_gates, column_names, count_parameters, kinds
from meetjax.data.records import Message
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import Request, stream_text
from meetjax.generate.sampling import Sampling
from meetjax.models.decoder import unstack, unstack_bank
from meetjax.models.load import Model

HELP = """/set NAME STRENGTH    how much of an adapter: 0 base, 1 trained, between, beyond, or below 0 for the other way
/dial STRENGTH|off    mix logits instead: strength * adapted + (1 - strength) * base
/adapters             what is loaded, and where its dial stands
/system [TEXT]        a system message (none: the model's own) from here on
/reset                forget the conversation
/help, /quit          or Ctrl-D; Ctrl-C stops an answer"""


class Chat:
    """A model, its adapters with their dials, and what has been said."""

    def __init__(self, model: Model, folders: dict[str, Path], *, sampling: Sampling, seed: int, max_new_tokens: int):
        """folders: adapter by name, all trained on this model; one of several gate columns becomes name.0, name.1, ..., the last of them
        on. Raises MeetjaxError for one that cannot be used.
        """
        self.model, self.params = model, unstack(model.params)
        self.banks: dict[str, Bank] = {}
        self.strengths: dict[str, float] = {}
        for name, folder in folders.items():
            bank = load_adapters(folder, model.fingerprint)
            own = dict(zip(column_names(name, bank), apart(bank), strict=True))
            self.banks |= own
            self.strengths |= dict.fromkeys(own, 0.0) | dict.fromkeys([*own][-1:], 1.0)
        self.bank: Bank | None = unstack_bank(stack(list(self.banks.values()))) if self.banks else None
        self.dial: float | None = None
        self.system: str | None = None
        self.said: list[Message] = []
        self.sampling, self.seed, self.max_new_tokens = sampling, seed, max_new_tokens

    def answer(self, text: str) -> Iterator[str]:
        """Streams the answer to a message. Both are remembered once the first piece is there, so far as they have come."""
        said = [*self.said, Message("user", text)]
        # A base without a chat template knows no turns: it goes on with the last message alone.
        prompt = tuple(said) if self.model.tokenizer.chat_template else text
        request = Request(prompt, self.system, self._gates(), self.dial, self.sampling, self.seed + len(said))
        told = ""
        for piece in stream_text(self.model, self.params, request, adapters=self.bank, max_new_tokens=self.max_new_tokens):
            told += piece
            self.said = [*said, Message("assistant", told)]
            yield piece

    def command(self, line: str) -> str:
        """Does what a line that begins with / says, and returns what to tell. Raises MeetjaxError, with nothing changed."""
        name, _, rest = line.strip().partition(" ")
        actions: dict[str, Callable[[str], str]] = {
            "/set": self._set, "/dial": self._dial, "/adapters": lambda _: self.told(), "/system": self._system, "/reset": self._reset,
            "/help": lambda _: HELP,
        }  # fmt: skip
        if name not in actions:
            raise MeetjaxError(f"{name}: no such command", expected=", ".join([*actions, "/quit"]))
        return actions[name](rest.strip())

    def told(self) -> str:
        """One line an adapter, and the logit dial."""
        lines = [
            f"{name}: {self.strengths[name]:g}  ({', '.join(kinds(bank))}, {count_parameters(bank):,} numbers)"
            for name, bank in self.banks.items()
        ]
        return "\n".join([*lines, f"logit dial: {'off' if self.dial is None else f'{self.dial:g}'}"] if lines else ["no adapter is loaded"])

    def _gates(self) -> tuple[float, ...] | None:
        return tuple(self.strengths.values()) or None

    def _set(self, rest: str) -> str:
        name, _, value = rest.rpartition(" ")
        if name.strip() not in self.banks:
            raise MeetjaxError("/set", expected="NAME STRENGTH, a name of " + (", ".join(self.banks) or "none"), found=rest or "nothing")
        name, strength = name.strip(), _number("/set", value)
        check_gates(self.banks[name], np.full((1, 1), strength, np.float32), 1)
        self.strengths[name] = strength
        return self.told()

    def _dial(self, rest: str) -> str:
        if not self.banks:
            raise MeetjaxError("/dial: no adapter is loaded", fix="start with --adapter NAME=DIR")
        self.dial = None if rest == "off" else _number("/dial", rest)
        return self.told()

    def _system(self, rest: str) -> str:
        if not self.model.tokenizer.chat_template:
            raise MeetjaxError("/system", expected="a model with a chat template", found=self.model.name)
        self.system = rest or None
        return "system message set" if rest else "no system message of yours"

    def _reset(self, rest: str) -> str:
        self.said = []
        return "forgotten"


def named_folders(pairs: tuple[str, ...]) -> dict[str, Path]:
    """Adapters from NAME=DIR. Raises MeetjaxError for another form or a name given twice."""
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder or shlex.quote(name) != name or name in folders:
            raise MeetjaxError("--adapter", expected="NAME=DIR, each name once and without spaces", found=pair)
        folders[name] = Path(folder)
    return folders


def _number(what: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise MeetjaxError(what, expected="a finite number", found=text or "nothing")


def talk(chat: Chat, console: Console, read: Callable[[str], str] = input) -> None:
    """Reads lines until /quit or the end of input. A mistake costs one line, and the conversation goes on."""

    def show(text: Any, end: str = "\n") -> None:
        console.print(text, end=end, markup=False, highlight=False, soft_wrap=True)

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editing)
    show(f"{chat.model.name}. /help says what there is besides talking.\n{chat.told()}")
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return show("")
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                show(chat.command(line))
            elif line:
                for piece in chat.answer(line):
                    show(piece, end="")
                show("")
        except MeetjaxError as error:
            show(f"error: {error}")
        except KeyboardInterrupt:
            show(" (stopped)")
