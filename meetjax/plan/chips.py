"""TPU topologies without a TPU: the real compiler describes them on any machine, and what it does not say of a chip is published."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

from meetjax.errors import MeetjaxError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published numbers of one chip: peak of dense bfloat16 products in FLOP/s, memory in bytes, its bandwidth and that of all links
    to other chips together in bytes/s; devices: how many JAX sees in it.
    """

    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    devices: int = 1


GIB = 2**30
CHIPS = {  # cloud.google.com/tpu/docs, "System architecture" of each version
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 2),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 2),
}


def open_topology(name: str, slices: int = 1) -> tuple[list[Any], Chip]:
    """(devices, numbers of one chip) of a topology such as v5e:16x16, in `slices` of it.

    Raises MeetjaxError for a name that is none, a topology that does not exist, and where the compiler is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in CHIPS or slices < 1:
        expected = "KIND:AxB or KIND:AxBxC, KIND one of " + ", ".join(CHIPS) + ", as in v5e:16x16 or v5p:4x4x4"
        raise MeetjaxError("plan: topology", expected=expected, found=name)
    if importlib.util.find_spec("libtpu") is None:
        raise MeetjaxError("plan: the TPU compiler", expected="libtpu", found="none", fix="pip install 'meetjax[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks the metadata server of a cloud for minutes
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so two plans do not disturb each other
    from jax.experimental import topologies

    single: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if name.split(":")[1] in ("1x1", "1x1x1") else {}
    several: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **single, **several)
    except Exception as error:  # the compiler raises what its own status says
        raise MeetjaxError(f"plan: topology {name}", expected="one that exists", found=str(error).splitlines()[0]) from error
    return list(found.devices), CHIPS[match[1]]
