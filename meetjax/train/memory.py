"""How much of the forward pass a step keeps for the backward one: the fastest that fits, by the compiled step's own account."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax

from meetjax.train.hosts import least


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a step said: seconds it took, and bytes of one device that it needs while it runs, arguments included."""

    seconds: float
    bytes: int


def compile_step(step: Callable, *arguments: Any) -> Compiled:
    """Compiles a jitted step ahead of its first call with arguments of these shapes, which then finds it compiled."""
    begun = time.monotonic()
    found = step.lower(*arguments).compile().memory_analysis()
    needed = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    return Compiled(time.monotonic() - begun, needed)


def device_bytes(device: Any) -> int:
    """Memory of a device; of a CPU's devices, an equal share of the machine's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count(device.platform)


def peak_device_gb() -> float | None:
    """Most memory ever in use on this process's first device, in GB (1e9 bytes); None where the device does not count (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def choose_remat(remat: str, make: Callable[[str], Callable], arguments: tuple, device: Any) -> tuple[Callable, str]:
    """(the step under the policy `remat`, a line that says why); "auto" takes the first policy whose step fits the device.

    make: policy -> jitted step; arguments: with the largest batch. From fast to small: keep all ("none"), keep what products gave
    ("dots"), keep the residual stream ("full"). Only on TPU is keeping all tried: on CPU it is slower than computing again what is cheap,
    and on a GPU too (H200, a model of 1B, 2,048 tokens: 37 ms a step against 33 of "dots" and 38 of "full").
    """
    limit = least("memory of a device", device_bytes(device))  # hosts that chose differently would run different programs
    automatic = ("none", "dots", "full") if device.platform == "tpu" else ("dots", "full")
    said = "remat"
    for policy in automatic if remat == "auto" else (remat,):
        step = make(policy)
        compiled = compile_step(step, *arguments)
        said += f" {policy}: {compiled.bytes / 1e9:.2f} of {limit / 1e9:.1f} GB a device, compiled in {compiled.seconds:.1f} s"
        if compiled.bytes <= limit:
            break
        said += ", does not fit;"
    return step, said
