"""Continuous batching: requests join and leave a running batch, every one with a mixture of adapters of its own.

One thread runs the loop: take what was asked of it between steps, run a chunk of the prompt of the request that joins next, dispatch
a decoding step, and read the tokens of the step before while the device works. A row that turns out to have ended has then run
one step too many, which nobody sees.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax

from meetjax.adapters.io import load_adapters
from meetjax.errors import MeetjaxError
from meetjax.generate.sampling import Sampling
from meetjax.models.decoder import unstack
from meetjax.serve import programs
from meetjax.serve.prefix import PrefixCache
from meetjax.serve.room import AdapterInfo, Room, Shelf
from meetjax.serve.rows import Prefill, Request, Rows, cell_counts
from meetjax.serve.stream import Ask, Piece, QueueFull, Stream, check_ask
from meetjax.serve.text import Writer
from meetjax.serve.warm import run_all

__all__ = ["AdapterInfo", "Ask", "Engine", "Piece", "QueueFull", "Room", "Sampling", "Stats", "Stream"]

LOG = logging.getLogger(__name__)
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the engine is doing. Counts since the start, but for active, queued and slots, which are now.

    slots: rows of the batch; active: of them in use; queued: requests waiting; done, failed, cancelled: requests that ended; tokens:
    made; compiles: programs compiled since `warm_up` ended; prefix_hits, prefix_misses: prompt blocks found in and missing from the
    prefix cache; prefix_bytes: it holds; step_seconds: recent median of a decoding step.
    """

    slots: int
    active: int
    queued: int
    done: int
    failed: int
    cancelled: int
    tokens: int
    compiles: int
    prefix_hits: int
    prefix_misses: int
    prefix_bytes: int
    step_seconds: float


class Engine:
    """One model, a bank with room for adapters, and a batch of `slots` rows of at most `capacity` tokens each, prompt and answer.

    queue: requests that may wait; prefix_cache: bytes of prompt blocks to keep, 0 for none. A request takes one row; with a logit
    dial, two; with n identity blocks, n more.
    """

    def __init__(
        self, model: Any, *, slots: int = 8, capacity: int = 1024, room: Room | None = None, queue: int = 64, prefix_cache: int = 256 << 20
    ):
        if not 2 <= capacity <= model.config.max_position:
            raise MeetjaxError("engine: capacity", expected=f"2 to {model.config.max_position} tokens", found=capacity)
        for name, value in (("slots", slots), ("queue", queue)):
            if value < 1:
                raise MeetjaxError(f"engine: {name}", expected=">= 1", found=value)
        self.model, self.slots, self.capacity, self.queue = model, slots, capacity, queue
        self._config = dataclasses.replace(model.config, remat="none")
        self._params = unstack(model.params) if "blocks" in model.params else model.params
        self.room = room or Room()
        self._shelf = Shelf(self._config, self.room)
        self._prefix = PrefixCache(prefix_cache)
        self._cells = cell_counts(self.room.prompts_at_once * self.room.prompt_length if self.room.prompts else 0, capacity)
        self._rows = Rows(self._config, self._params, self._shelf, slots, self._cells)
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Request] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._prefill: Prefill | None = None
        self._flight: deque[tuple[programs.Made, list[tuple[int, Request]], bool]] = deque()
        self._counts = dict.fromkeys(("done", "failed", "cancelled", "tokens", "compiles"), 0)
        self._steps: deque[float] = deque(maxlen=64)
        self._spent: deque[float] = deque(maxlen=32)
        self._landed = 0.0
        self._refusing, self._stopping = "", False
        self._thread = threading.Thread(target=self._run, name="meetjax-engine", daemon=True)
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        self._thread.start()

    # What other threads call.

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        with self._changed:
            return {name: loaded.info for name, loaded in self._shelf.adapters.items()}

    @property
    def refusing(self) -> str:
        """Why new requests are refused; empty while they are not."""
        return self._refusing

    def submit(self, ask: Ask) -> Stream:
        """Queues a request. Raises MeetjaxError for what cannot be answered and QueueFull."""
        check_ask(ask, self._config.vocab, self.capacity)
        with self._changed:
            self._check_open()
            strengths = []
            for name, strength in ask.adapters.items():
                if name not in self._shelf.adapters:
                    found = " or ".join(self._shelf.adapters) or "none: no adapter is loaded"
                    raise MeetjaxError(f"adapters: {name!r} is not loaded", expected=found, found=name)
                loaded = self._shelf.adapters[name]
                if strength < 0 and "prompt" in loaded.places:
                    raise MeetjaxError(
                        f"adapters: strength of {name}, a soft prompt",
                        expected=">= 0 (its logarithm biases attention)",
                        found=strength,
                        fix="use the logit dial for negative strengths",
                    )
                strengths.append((loaded, float(strength)))
            ways = self._shelf.ways(strengths, ask.dial)
            if len(ways) > self.slots:
                raise MeetjaxError("engine: slots", expected=f">= {len(ways)}, one a stream of this request", found=self.slots)
            if len(self._waiting) >= self.queue:
                raise QueueFull(len(self._waiting), self._retry_after())
            request = Request(
                Stream(ask), ways, [loaded for loaded, _ in strengths], Writer(self.model.tokenizer, ask.stop), time.monotonic()
            )
            for loaded in request.loaded:
                loaded.users += 1
            self._waiting.append(request)
            self._changed.notify_all()
        return request.stream

    def load(self, name: str, folder: Path) -> None:
        """Puts the adapter of a folder into the bank; one with several gate columns as name.0, name.1, ...

        Raises MeetjaxError for a bad file or name, another base, or what does not fit into the room.
        """
        bank = load_adapters(folder, self.model.fingerprint)
        self.put(name, bank, Path(folder))

    def put(self, name: str, bank: Any, folder: Path = Path()) -> None:
        """`load` of a bank at hand."""
        if not name or set(name) & set("@+ \t\n,=:"):
            raise MeetjaxError("adapter: name", expected="a name without spaces or any of @ + , = :", found=repr(name))
        self._between_steps(lambda: self._shelf.put(name, folder, bank))

    def unload(self, name: str) -> None:
        """Takes an adapter out. Requests that use it are finished first; new ones are refused at once."""
        self._between_steps(lambda: self._shelf.remove(name))

    def stats(self) -> Stats:
        """Figures of now."""
        with self._changed:
            prefix = self._prefix
            return Stats(
                slots=self.slots,
                active=self.slots - len(self._rows.free),
                queued=len(self._waiting) + (self._prefill is not None),
                **self._counts,
                prefix_hits=prefix.hits,
                prefix_misses=prefix.misses,
                prefix_bytes=prefix.bytes,
                step_seconds=median(self._steps) if self._steps else 0.0,
            )

    def warm_up(self) -> None:
        """Compiles every program ahead, by running each once."""
        self._between_steps(self._warm)

    def drain(self, seconds: float) -> None:
        """Refuses new requests and waits at most `seconds` for the open ones."""
        end = time.monotonic() + seconds
        with self._changed:
            self._refusing = self._refusing or "the engine is shutting down"
            while self._open() and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.1))

    def close(self) -> None:
        """Ends the loop and fails every stream that is still open."""
        with self._changed:
            self._refusing = self._refusing or "the engine is shutting down"
            self._stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self._refusing:
            raise MeetjaxError(f"engine: {self._refusing}", fix="start it again")

    def _between_steps(self, command: Callable[[], None]) -> None:
        """Runs it in the loop's thread and waits; its exception is raised here."""
        done, failures = threading.Event(), []

        def run() -> None:
            try:
                if self._stopping:
                    self._check_open()
                command()
            except Exception as error:
                failures.append(error)
            finally:
                done.set()

        with self._changed:
            self._check_open()
            self._commands.append(run)
            self._changed.notify_all()
        done.wait()
        if failures:
            raise failures[0]

    def _retry_after(self) -> float:
        each = sum(self._spent) / len(self._spent) / self.slots if self._spent else 1.0
        return min(60.0, max(1.0, each * len(self._waiting)))

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and threading.get_ident() == self._thread.ident:
            self._counts["compiles"] += 1

    # The loop.

    def _open(self) -> bool:
        return bool(self._waiting or self._prefill or self._rows.requests or self._flight)

    def _run(self) -> None:
        failure = "the engine was closed before this request ended"
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # whatever it is, nobody may be left waiting
            failure = f"the engine stopped: {type(error).__name__}: {error}"
            LOG.exception("the engine stopped")
        with self._changed:
            self._refusing, self._stopping = failure, True
            prefilling = [self._prefill.request] if self._prefill else []
            for request in [*self._rows.requests, *prefilling, *self._waiting]:
                self._counts["failed"] += 1
                request.stream.fail(failure)
            self._rows.owners = [None] * self.slots
            self._waiting.clear()
            self._flight.clear()
            self._prefill = None
            while self._commands:
                self._commands.popleft()()  # raises where it was asked for
            self._changed.notify_all()
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _turn(self) -> None:
        with self._changed:
            while not (self._open() or self._commands or self._stopping):
                self._changed.wait()
            while self._commands:
                self._commands.popleft()()
            self._drop_cancelled()
            self._next_prefill()
        if self._prefill is not None:
            self._run_prefill(self._prefill)
        ahead = 0
        if self._rows.requests:
            owners = [(row, owner) for row, owner in enumerate(self._rows.owners) if owner is not None]
            steady = self._prefill is None
            made = self._rows.step()
            self._flight.append((made, [(row, owner) for row, owner in owners if row == next(iter(owner.rows))], steady))
            ahead = 1
        while len(self._flight) > ahead:
            self._land(*self._flight.popleft())

    def _next_prefill(self) -> None:
        """First come, first served: a request that waits for several rows is not overtaken, so a long one cannot starve."""
        if self._prefill is None and self._waiting and len(self._waiting[0].ways) <= len(self._rows.free):
            request = self._waiting.popleft()
            self._prefill = Prefill(self._config, self._params, self._shelf, self._prefix, self._cells, request)

    def _run_prefill(self, prefill: Prefill) -> None:
        """One chunk, so that running answers wait for no more than that; then the request's first token."""
        try:
            prefill.run()
            if not prefill.finished:
                return
        except Exception as error:
            self._prefill = None
            self._end(prefill.request, error=f"the prompt could not be run: {error}")
            return
        with self._changed:
            made = self._rows.join(prefill.request, prefill)
            self._prefill = None
        self._flight.append((made, [(0, prefill.request)], False))

    def _drop_cancelled(self) -> None:
        prefilling = [self._prefill.request] if self._prefill else []
        for request in [*self._rows.requests, *self._waiting, *prefilling]:
            if request.stream.cancelled:
                if self._prefill and self._prefill.request is request:
                    self._prefill = None
                if request in self._waiting:
                    self._waiting.remove(request)
                self._end(request, Piece("", finish="cancelled"))

    def _land(self, made: programs.Made, rows: list[tuple[int, Request]], steady: bool) -> None:
        """Reads a step's tokens, which waits for the device, and passes them on."""
        read = jax.device_get(made)
        now = time.monotonic()
        if steady:
            self._steps.append(now - self._landed)
        self._landed = now
        for row, request in rows:
            if request.ended:
                continue
            try:
                self._pass_on(request, read, row)
            except Exception as error:
                self._end(request, error=f"the answer could not be written: {error}")

    def _pass_on(self, request: Request, read: Any, row: int) -> None:
        stream, ask = request.stream, request.stream.ask
        if not read.fine[row]:
            self._end(request, error="the model's logits are not finite at these strengths")
            return
        token, logprob, top = int(read.token[row]), None, ()
        if ask.logprobs:
            logprob = float(read.logprob[row])
            top = tuple((int(t), float(p)) for t, p in zip(read.top[row][: ask.logprobs], read.top_logprobs[row], strict=False))
        self._counts["tokens"] += 1
        if token in self._config.eos_token_ids:
            text, _ = request.writer.end()
            self._end(request, Piece(text, token, logprob, top, "stop"))
            return
        text, stopped = request.writer.add(token)
        if not stopped and stream.new_tokens + 1 >= ask.max_new_tokens:
            more, stopped = request.writer.end()
            self._end(request, Piece(text + more, token, logprob, top, "stop" if stopped else "length"))
        elif stopped:
            self._end(request, Piece(text, token, logprob, top, "stop"))
        else:
            stream.put(Piece(text, token, logprob, top))

    def _end(self, request: Request, piece: Piece | None = None, error: str = "") -> None:
        """Frees what a request holds and ends its stream, with its last piece or what went wrong."""
        with self._changed:
            request.ended = True
            self._rows.release(request)
            for loaded in request.loaded:
                loaded.users -= 1
            self._shelf.sweep()
            kind = "failed" if piece is None else "cancelled" if piece.finish == "cancelled" else "done"
            self._counts[kind] += 1
            if kind == "done":
                self._spent.append(time.monotonic() - request.begun)
            self._changed.notify_all()
        if piece is None:
            request.stream.fail(error)
        else:
            request.stream.put(piece)

    def _warm(self) -> None:
        run_all(self._config, self._params, self._shelf, self._rows, self._cells)
        self._counts["compiles"] = 0
