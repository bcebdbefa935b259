"""What the hosts of one run have to agree on, and which rows of a batch each of them holds.

JAX's own runtime connects the hosts (`meetjax/launch.py` starts it). What they say to each other here goes through its key-value
store and not through their devices: two hosts that disagree would start different programs there, and wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meetjax.errors import MeetjaxError
from meetjax.types import BATCH_AXES

SETTLE = 30.0
"""Seconds that a network file system may take to show one host what another has written."""
_calls = itertools.count()
"""All hosts make the same calls in the same order, so its numbers name them."""
_steps = itertools.count(1)


def patience() -> float:
    """Seconds that one host waits for another: `$MEETJAX_HOST_TIMEOUT`, else 300."""
    text = os.environ.get("MEETJAX_HOST_TIMEOUT", "300")
    try:
        if (seconds := float(text)) > 0:
            return seconds
    except ValueError:
        pass
    raise MeetjaxError("MEETJAX_HOST_TIMEOUT", expected="seconds, more than 0", found=text)


def writes() -> bool:
    """Whether this host writes logs, metrics, summary and adapters: the first one does."""
    return jax.process_index() == 0


def gather(what: str, text: str) -> list[str]:
    """The text of every host, in their order. Raises MeetjaxError that names the hosts that do not come within `patience()`."""
    if jax.process_count() == 1:
        return [text]
    from jax._src.distributed import global_state  # the store has no public name; Orbax takes it from here too

    store: Any = global_state.client
    folder, limit = f"meetjax/{next(_calls)}/{what}", time.monotonic() + patience()
    store.key_value_set(f"{folder}/{jax.process_index()}", text)
    texts, missing = [], []
    for host in range(jax.process_count()):
        try:
            left = max(limit - time.monotonic(), 0.001)
            texts.append(store.blocking_key_value_get(f"{folder}/{host}", int(left * 1000) + 1))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(host)
    if missing:
        expected = f"{jax.process_count()} hosts within {patience():.0f} s"
        fix = "see the logs of the missing ones; MEETJAX_HOST_TIMEOUT=SECONDS waits longer"
        raise MeetjaxError(f"{what}: missing {named(missing)}", expected=expected, found=len(texts), fix=fix)
    return texts


def named(hosts: list[int]) -> str:
    """host 3; hosts 3, 5 and 7."""
    if len(hosts) == 1:
        return f"host {hosts[0]}"
    return f"hosts {', '.join(map(str, hosts[:-1]))} and {hosts[-1]}"


def agree(what: str, facts: Any) -> None:
    """Raises MeetjaxError on every host where one has other facts (JSON data) than host 0, naming the host and the first difference."""
    found = [json.loads(text) for text in gather(what, json.dumps(facts, default=str))]
    for host, other in enumerate(found):
        if differing := differences(found[0], other):
            where, first, own = differing[0]
            name = f"{what}: {where}" if where else what
            fix = "start the same command with the same files on every host"
            raise MeetjaxError(f"hosts disagree: {name}", expected=f"{first} as on host 0", found=f"{own} on host {host}", fix=fix)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All hosts leave the block or none does: an error on one is raised on every one, with the number of its host."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = gather(what, "" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for host, text in enumerate(told):
        if text:
            raise MeetjaxError(f"host {host}: {text}")


def least(what: str, number: int) -> int:
    """The smallest of the hosts' numbers."""
    return min(map(int, gather(what, str(number))))


def check_shared(folder: Path) -> None:
    """Raises MeetjaxError, on every host, for a folder that one cannot write or that is another one there: all save into it."""
    mark = folder / ".hosts"
    with together(f"{folder}"):
        try:
            if writes():
                folder.mkdir(parents=True, exist_ok=True)
                mark.write_text(str(time.time_ns()))
        except OSError as error:
            fix = "choose another out folder, or make it writable"
            raise MeetjaxError(f"{folder}: cannot be written", found=error.strerror or error, fix=fix) from error
    expected = gather(f"{folder}", mark.read_text() if writes() else "")[0]
    limit = time.monotonic() + min(patience() / 2, SETTLE)
    while not (seen := mark.exists() and mark.read_text() == expected) and time.monotonic() < limit:
        time.sleep(0.05)
    blind = [host for host, text in enumerate(gather(f"{folder}", "" if seen else "blind")) if text]
    if writes():
        mark.unlink(missing_ok=True)
    if blind:
        fix = "give an out folder that all hosts share, on a network file system"
        raise MeetjaxError(f"{folder}: not one folder for all hosts", found=f"another one on {named(blind)}", fix=fix)


def share_of(mesh: Mesh) -> tuple[int, int]:
    """(part, parts): this process holds part `part` of the `parts` equal parts of a batch's rows.

    As many parts as processes, unless a "model" axis over several processes makes them hold the same rows. Raises MeetjaxError
    for a mesh without a device of every process, or whose processes do not hold equal runs of rows.
    """
    if jax.process_count() == 1:
        return 0, 1
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    last = [axis for axis in mesh.axis_names if axis not in BATCH_AXES]
    order = [mesh.axis_names.index(axis) for axis in (*BATCH_AXES, *last)]
    owners = owners.transpose(order).reshape(ways, -1)
    held = [np.flatnonzero((owners == host).any(1)) for host in range(jax.process_count())]
    if empty := [host for host, rows in enumerate(held) if not len(rows)]:
        expected = f"all {jax.device_count()} devices of {jax.process_count()} hosts"
        raise MeetjaxError("recipe: train.mesh", expected=expected, found=f"{dict(mesh.shape)}, none of {named(empty)}")
    size = len(held[0])
    if any(len(rows) != size or rows[0] % size or rows[-1] - rows[0] + 1 != size for rows in held):
        raise MeetjaxError(
            "recipe: train.mesh", expected="the same number of neighbouring data x fsdp places a host", found=dict(mesh.shape)
        )
    return int(held[jax.process_index()][0]) // size, ways // size


def own_rows(mesh: Mesh | None, count: int) -> slice:
    """This host's places in a batch of `count` rows."""
    part, parts = (0, 1) if mesh is None else share_of(mesh)
    return slice(part * count // parts, (part + 1) * count // parts)


def whole(tree: Any, mesh: Mesh) -> Any:
    """The same arrays with all of each on every device, so that every host can read them."""
    return _replicating(mesh)(tree)


@functools.cache
def _replicating(mesh: Mesh) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def preempted() -> bool:
    """Whether to save and stop after this step, for some host has been told to: true on all hosts at the same call. Call it each step."""
    return multihost_utils.reached_preemption_sync_point(next(_steps))


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(path, old, new) of every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new, strict=True)) for d in differences(*pair, f"{where}.{i}".lstrip("."))]
    return [] if old == new else [(where, old, new)]
