"""A bank of fixed shape with room for adapters that come and go."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Room:
    """How many adapters of each kind fit, and how large. What there is room for is computed at every step, used or not; 0 costs nothing.

    prompts_at_once: soft prompts that one request may mix; identities: blocks of CLM.
    """

    prompts: int = 8
    prompt_length: int = 32
    prompts_at_once: int = 2
    loras: int = 8
    rank: int = 16
    lora_sites: tuple[str, ...] = ("q", "v")
    edits: int = 8
    edit_sites: tuple[str, ...] = ("down",)
    identities: int = 0
    identity_blocks: int = 1


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its kinds, how many numbers were trained, where it came from."""

    kinds: tuple[str, ...]
    parameters: int
    folder: Path
