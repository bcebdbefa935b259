"""Checkpoints: trainable leaves, optimiser, data position and the resolved recipe; never the frozen base."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from meetjax.adapters.tree import flatten, unflatten
from meetjax.errors import MeetjaxError
from meetjax.train.hosts import differences
from meetjax.train.step import State

KEEP = 2


class Checkpoints:
    """Asynchronous Orbax checkpoints of one stage under `folder`; a save that fails leaves the ones before it whole."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        """identity: what must agree to resume (recipe, base fingerprint), stored with every checkpoint."""
        self.folder = folder.absolute()
        self.identity = json.loads(json.dumps(identity, default=str))
        place: Any = self.folder
        keep: Any = ocp.training.preservation_policies.LatestN(KEEP)
        with self._told("opened"):
            # A killed run leaves a half-written folder behind, which only takes space.
            self._orbax = ocp.training.Checkpointer(place, preservation_policy=keep, cleanup_tmp_directories=True)

    def save(self, state: State, loader: dict[str, Any]) -> None:
        """Starts writing the state after `state.step` steps; waits only for the save before it."""
        with self._told("written"):
            step = int(state.step)
            if self._orbax.latest is None or self._orbax.latest.step < step:
                # A copy, because the next training step donates these buffers while the write goes on.
                leaves = jax.tree.map(lambda leaf: leaf.copy(), flatten(state))
                # Forced, because Orbax otherwise skips a step silently while the one before it is being written.
                self._orbax.save_checkpointables_async(step, {"state": leaves, "loader": loader, "identity": self.identity}, force=True)

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest (state, loader position), placed as `like` is; None when there is none.

        Raises MeetjaxError when the checkpoint belongs to another base or recipe, or cannot be read.
        """
        with self._told("read"):
            latest = self._orbax.latest
            if latest is None:
                return None
            stored = self._orbax.load_checkpointables(latest.step, {"identity": None})["identity"]
            if differing := differences(stored, self.identity):
                where, old, new = differing[0]
                raise MeetjaxError(
                    f"{self.folder}: checkpoint of another run: {where}",
                    expected=old,
                    found=new,
                    fix="choose another out folder, or restore the old setting",
                )
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), flatten(like))
            loaded = self._orbax.load_checkpointables(latest.step, {"state": abstract, "loader": None})
            return unflatten(like, loaded["state"]), loaded["loader"]

    @property
    def newest(self) -> int | None:
        """Step of the newest finished checkpoint; waits for the write that goes on."""
        with self._told("written"):
            self._orbax.wait()
        return None if self._orbax.latest is None else self._orbax.latest.step

    def close(self) -> None:
        """Waits for the last write."""
        with self._told("written"):
            self._orbax.close()

    @contextlib.contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        try:
            yield
        except MeetjaxError:
            raise
        except Exception as error:  # Orbax raises many types; the user needs the folder, the cause and what is left.
            raise MeetjaxError(
                f"{self.folder}: checkpoint could not be {verb}",
                found=f"{type(error).__name__}: {error}"[:300],
                fix="earlier checkpoints are untouched; free space or choose another out folder",
            ) from error
