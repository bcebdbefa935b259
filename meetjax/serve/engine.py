"""Continuous batching: requests join and leave a running batch, every one with a mixture of adapters of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from meetjax.serve.room import AdapterInfo, Room
from meetjax.serve.stream import Ask, Piece, QueueFull, Stream

__all__ = ["AdapterInfo", "Ask", "Engine", "Piece", "QueueFull", "Room", "Stats", "Stream"]


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
    """One model, a bank with room for adapters, and a batch of `slots` rows of at most `capacity` tokens each.

    queue: requests that may wait; prefix_cache: bytes of prompt blocks to keep, 0 for none. The loop runs in a thread of its own.
    """

    adapters: dict[str, AdapterInfo]

    def __init__(
        self, model: Any, *, slots: int = 8, capacity: int = 1024, room: Room | None = None, queue: int = 64, prefix_cache: int = 256 << 20
    ):
        raise NotImplementedError

    def submit(self, ask: Ask) -> Stream:
        """Queues a request. Raises MeetjaxError for what cannot be answered and QueueFull."""
        raise NotImplementedError

    def load(self, name: str, folder: Path) -> None:
        """Puts an adapter into the bank. Raises MeetjaxError for a bad file or name, or when the room is full."""
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Takes an adapter out. Requests that use it are finished first; new ones are refused at once."""
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    def warm_up(self) -> None:
        """Compiles every program ahead."""
        raise NotImplementedError

    def drain(self, seconds: float) -> None:
        """Refuses new requests and waits at most `seconds` for the open ones."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the loop and fails every stream that is still open."""
        raise NotImplementedError
