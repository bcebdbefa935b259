"""Becoming one process of a run over several hosts, and saying in one line why it had to end.

The runtime is JAX's own (`jax.distributed`). When a host does not come, or is gone, it ends every process from C++ (SIGABRT and a page
of stack), out of Python's reach. So the work is done in a child, and its parent only waits, passes signals on and tells how it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from meetjax.errors import MeetjaxError
from meetjax.train.hosts import named, patience

LOST = 75
"""Exit status when another host is gone (EX_TEMPFAIL of sysexits.h): the same command on all hosts goes on."""
HEARTBEAT = 100.0
"""Seconds of silence after which JAX gives a host up, unless `patience()` is shorter."""
LEAVE = 10.0
"""Seconds that a host that failed waits for others to have failed alike."""
_FATAL = re.compile(r"[WEF]\d{4} .*(coordination|client\.h)")

_NOTED = re.compile(r"W\d{4} .*preemption_notifier")
"""The runtime has seen a SIGTERM; what comes of it is told when it is done."""


def join_hosts(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> bool:
    """Connects this process with the others of its run; False where there are none. Before any JAX computation.

    coordinator: host:port of process 0. All None: JAX detects Cloud TPU, GKE and Slurm; a lone process stays alone. Returns in a
    child process; the parent exits with its status. Raises MeetjaxError for flags that do not fit.
    """
    given = (coordinator, processes, process)
    if any(item is not None for item in given):
        _check(coordinator, processes, process)
    elif not _in_cluster():
        return False
    limit = patience()
    _run_in_child(given)
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue], made at build time

    runtime: Any = _jax
    plain = runtime.get_distributed_runtime_service
    # Without a limit of its own the service waits an hour, and then nobody knows who was missing: only it can tell.
    runtime.get_distributed_runtime_service = functools.partial(plain, cluster_register_timeout=max(int(limit) - 1, 1))
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=int(limit) + 1,
            heartbeat_timeout_seconds=max(int(min(limit, HEARTBEAT)), 1), shutdown_timeout_seconds=max(int(limit), 1),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        fix = "choose another port, or see what the launcher told each process"
        raise MeetjaxError("hosts: cannot be connected", found=error, fix=fix) from error
    finally:
        runtime.get_distributed_runtime_service = plain
    return True


def leave(status: int) -> NoReturn:
    """Ends this process after an error that it has told. Of several hosts those that met the same error end together; one that
    is alone with its own does not wait for the others, who are held up in a step without it and will learn of its end.
    """
    from jax._src.distributed import global_state

    if global_state.client is None:
        sys.exit(status)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        global_state.client.wait_at_barrier("meetjax/leave", int(1000 * min(patience(), LEAVE)))
    sys.stdout.flush()
    sys.stderr.flush()
    if global_state.service is not None:
        time.sleep(0.5)  # without the service of host 0 the others would end by a signal
    os._exit(status)


def fail(error: Exception) -> NoReturn:
    """Ends this process after an error that is no user's: as Python does, or, of several hosts, without waiting for the others.

    A computation that failed because another host is gone is told by the runtime, which ends this process; it gets the time to.
    """
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise error
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        time.sleep(1.5 * min(patience(), HEARTBEAT))
    traceback.print_exception(error)
    leave(1)


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise MeetjaxError("hosts", expected="--coordinator, --processes and --process together", found="not all three")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise MeetjaxError("hosts: --coordinator", expected="HOST:PORT of process 0", found=coordinator)
    if processes < 1 or not 0 <= process < processes:
        raise MeetjaxError("hosts: --process", expected=f"0 to {processes - 1}, for --processes {processes}", found=process)


def _in_cluster() -> bool:
    """Whether JAX recognises a cluster of more than one process here."""
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster.get_process_count() > 1
    return False


def _run_in_child(given: tuple[str | None, int | None, int | None]) -> None:
    """Returns in a child process. The parent passes SIGTERM on, and exits as the child does."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a parent killed outright leaves nobody behind
            if os.getppid() != parent:
                os._exit(LOST)
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
        return
    os.close(write)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child too
    fatal: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(read, fatal), daemon=True)
    reader.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader.join(2.0)
    if fatal and status == -signal.SIGABRT:
        print(f"error: {why_it_ended(''.join(fatal), given[0])}", file=sys.stderr)
        status = LOST
    elif fatal:
        sys.stderr.writelines(fatal)
    elif status < 0:
        print(f"error: killed by {signal.Signals(-status).name}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 - status if status < 0 else status)


def _pass_on(read: int, fatal: list[str]) -> None:
    """Copies a child's stderr, and keeps back what the runtime says about the end of the run, which is in no way one line."""
    with open(read, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if fatal or _FATAL.match(line):
                fatal.append(line)
            elif not _NOTED.match(line):
                sys.stderr.write(line)
                sys.stderr.flush()


def why_it_ended(log: str, coordinator: str | None = None) -> MeetjaxError:
    """What the runtime's last words mean."""
    never = re.search(r"timed out task names:\s*((?:\d+[,\s]*)+)", log)
    silent = re.search(r"stopped sending heartbeats\):\s*((?:\d+[,\s]*)+)", log)
    first = f"host 0, the coordinator{f' at {coordinator}' if coordinator else ''},"
    if never or "RegisterTask" in log:
        who = named(sorted({int(number) for number in re.findall(r"\d+", never[1])})) if never else first
        fix = "start the same command on every host; MEETJAX_HOST_TIMEOUT=SECONDS waits longer"
        return MeetjaxError(f"{who} did not come within {patience():.0f} s", fix=fix)
    who = named(sorted({int(number) for number in re.findall(r"\d+", silent[1])})) if silent else first
    fix = "see its log; the last checkpoint stands, the same command on all hosts goes on"
    return MeetjaxError(f"{who} is gone: killed, cut off, or ended by an error of its own", fix=fix)
