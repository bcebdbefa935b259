"""Checkpoints: trainable leaves, optimiser, data position and the resolved recipe; never the frozen base."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import orbax.checkpoint.experimental.v1 as ocp

from meetjax.adapters.tree import flatten, unflatten
from meetjax.errors import MeetjaxError
from meetjax.train import hosts
from meetjax.train.hosts import differences
from meetjax.train.step import State

KEEP = 2


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder while the block lasts; of several hosts the one that writes holds it for all. Raises
    MeetjaxError when another run is in it, or it cannot be written.
    """
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    with hosts.together("out"):
        try:
            if hosts.writes():
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except filelock.Timeout:
            fix = "wait for that run, or choose another out folder"
            raise MeetjaxError(f"{folder}: run folder", expected="no other run in it", found="one that is going on", fix=fix) from None
        except OSError as error:
            found, fix = error.strerror or str(error), "choose another out folder"
            raise MeetjaxError(f"{folder}: run folder", expected="a folder to write to", found=found, fix=fix) from None
    try:
        yield
    finally:
        lock.release()


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

    def restore(self, like: State, say: Callable[[str], Any] = print) -> tuple[State, dict[str, Any]] | None:
        """The newest (state, loader position) that can be read, placed as `like` is; None when there is no checkpoint.

        `say` is told of each newer one that cannot be read; it stays beside the others as `STEP.unreadable`. Raises MeetjaxError when
        the newest belongs to another base or recipe, or none can be read.
        """
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), flatten(like))
        broken: dict[int, str] = {}
        with self._told("read"):
            for step in sorted((found.step for found in self._orbax.checkpoints), reverse=True):
                loaded, failure = None, ""
                try:
                    self._check(self._orbax.load_checkpointables(step, {"identity": None})["identity"])
                    loaded = self._orbax.load_checkpointables(step, {"state": abstract, "loader": None})
                except MeetjaxError:
                    raise
                except Exception as error:  # Orbax raises many types
                    failure = _one_line(error)
                failures = list(filter(None, hosts.gather(f"checkpoint {step}", failure)))
                if loaded is None or failures:
                    broken[step] = failures[0]
                    continue
                for bad, failure in broken.items():
                    self._set_aside(bad)
                    say(f"checkpoint of step {bad} cannot be read, going on from step {step}: {failure}")
                return unflatten(like, loaded["state"]), loaded["loader"]
        if broken:
            raise self._failed("read", next(iter(broken.values())))
        return None

    def _check(self, stored: Any) -> None:
        if differing := differences(stored, self.identity):
            where, old, new = differing[0]
            raise MeetjaxError(
                f"{self.folder}: checkpoint of another run: {where}",
                expected=old,
                found=new,
                fix="choose another out folder, or restore the old setting",
            )

    def _set_aside(self, step: int) -> None:
        """Out of the way of the save that will come at this step again."""
        with hosts.together(f"checkpoint {step}"):
            if hosts.writes():
                aside = self.folder / f"{step}.unreadable"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.folder / str(step), aside)
        self._orbax.reload()

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
            raise self._failed(verb, _one_line(error)) from error

    def _failed(self, verb: str, found: str) -> MeetjaxError:
        fix = "earlier checkpoints are untouched; free space or choose another out folder"
        return MeetjaxError(f"{self.folder}: checkpoint could not be {verb}", found=found, fix=fix)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
