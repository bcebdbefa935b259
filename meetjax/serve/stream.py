"""What is asked of the engine, and the stream that it answers with."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping

from meetjax.errors import MeetjaxError
from meetjax.generate.sampling import Sampling

MOST_LOGPROBS = 8
"""Likeliest tokens that are reported at most."""
LARGEST_STRENGTH = 100.0
"""Strengths and dials beyond this are mistakes: no trained adapter says anything there."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    ids: prompt tokens, BOS included where the model has one; adapters: name -> strength, 0 where missing; dial: logit dial d,
    z = d z_adapted + (1 - d) z_base (None: off); stop: texts that end the answer and are not part of it; logprobs: 0 for none, n
    for the log-probability of each token and of the n likeliest.
    """

    ids: tuple[int, ...]
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dial: float | None = None
    sampling: Sampling = Sampling()
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int = 0


def check_ask(ask: Ask, vocab: int, capacity: int) -> None:
    """Raises MeetjaxError for what no engine can answer, whatever is loaded."""
    if not ask.ids:
        raise MeetjaxError("prompt: no token", expected="some text")
    if not all(0 <= token < vocab for token in ask.ids):
        raise MeetjaxError("prompt: token", expected=f"0 to {vocab - 1}", found=next(t for t in ask.ids if not 0 <= t < vocab))
    if ask.max_new_tokens < 1:
        raise MeetjaxError("max_new_tokens", expected=">= 1", found=ask.max_new_tokens)
    if len(ask.ids) + ask.max_new_tokens > capacity:
        found = f"{len(ask.ids)} + {ask.max_new_tokens}"
        fix = "shorten the prompt, ask for fewer new tokens, or start with a larger capacity"
        raise MeetjaxError("prompt: too long", expected=f"prompt + max_new_tokens <= {capacity} tokens", found=found, fix=fix)
    if not 0 <= ask.seed < 2**31:
        raise MeetjaxError("seed", expected="0 to 2^31 - 1", found=ask.seed)
    if not 0 <= ask.logprobs <= MOST_LOGPROBS:
        raise MeetjaxError("logprobs", expected=f"0 to {MOST_LOGPROBS}", found=ask.logprobs)
    if not all(ask.stop):
        raise MeetjaxError("stop", expected="texts that are not empty", found=list(ask.stop))
    given = {f"strength of {name}": value for name, value in ask.adapters.items()} | ({} if ask.dial is None else {"dial": ask.dial})
    for name, value in given.items():
        if not (math.isfinite(value) and abs(value) <= LARGEST_STRENGTH):
            raise MeetjaxError(name, expected=f"a number from -{LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}", found=value)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token of an answer: the text that became certain with it (perhaps none), never part of a stop text, never half a character.

    logprob: of the token, in nats, before temperature, top-k and top-p; top: the likeliest (token, log-probability); finish: None, and on
    the last piece "stop", "length", "cancelled" or "error" (`Stream.error` says which). The last two come without a token.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


class QueueFull(Exception):
    """No room for one more waiting request; retry_after: seconds until there may be."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Stream:
    """An answer while it is made: iterate, with `for` in a thread or `async for`, for its pieces. One reader.

    new_tokens counts the tokens so far, EOS included; error says what went wrong when the last piece's finish is "error".
    """

    def __init__(self, ask: Ask):
        self.ask = ask
        self.prompt_tokens = len(ask.ids)
        self.new_tokens = 0
        self.error: str | None = None
        self.cancelled = False
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self._closed = False
        self._read_all = False

    def cancel(self) -> None:
        """Gives the answer up; its place in the batch is free at the next step."""
        self.cancelled = True

    @property
    def finished(self) -> bool:
        """Whether the last piece has been made."""
        return self._closed

    def put(self, piece: Piece) -> None:
        """For the engine: one more piece. Pieces behind the last are dropped."""
        with self._changed:
            if self._closed:
                return
            self._pieces.append(piece)
            self._closed = piece.finish is not None
            self.new_tokens += piece.token is not None
            self._changed.notify_all()
            if self._wake is not None:
                self._wake()

    def fail(self, error: str) -> None:
        """For the engine: ends the stream with what went wrong."""
        self.error = self.error or error
        self.put(Piece("", finish="error"))

    def _take(self) -> Piece | None:
        if not self._pieces:
            return None
        piece = self._pieces.popleft()
        self._read_all = piece.finish is not None
        return piece

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        if self._read_all:
            raise StopIteration
        with self._changed:
            while (piece := self._take()) is None:
                self._changed.wait()
        return piece

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        if self._read_all:
            raise StopAsyncIteration
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            if (piece := self._take()) is not None:
                return piece
            self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            await arrived.wait()
        finally:
            with self._changed:
                self._wake = None
                piece = self._take()
        assert piece is not None
        return piece
