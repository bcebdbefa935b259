"""Prompts that were seen before: blocks of a row's cache, found by everything that they depend on."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import jax
import numpy as np

from meetjax.serve.programs import Block

CHUNK = 64
"""Tokens that are prefilled at a time, and of a block. A prompt is always cut at the same places, so a row that starts from
blocks and a row that computes them hold the same bits."""


def block_keys(ids: Sequence[int], way: Hashable) -> list[bytes]:
    """A key for each whole chunk of a prompt: all tokens up to its end, and `way`, what else the cells depend on.

    The last token is in no block: running it is what gives the answer's first.
    """
    running = hashlib.blake2b(repr(way).encode(), digest_size=16)
    keys = []
    for begin in range(0, len(ids) - CHUNK, CHUNK):
        running.update(np.asarray(ids[begin : begin + CHUNK], np.int32).tobytes())
        keys.append(running.digest())
    return keys


class PrefixCache:
    """Blocks under a budget of bytes; those that were used longest ago go first."""

    def __init__(self, budget: int):
        self.budget, self.bytes = budget, 0
        self.hits = self.misses = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def find(self, keys: Sequence[bytes]) -> list[Block]:
        """The blocks of a prompt's beginning, as many as there are without a gap."""
        found = []
        for key in keys:
            if key not in self._blocks:
                break
            found.append(self._blocks[key])
        for key in reversed(keys[: len(found)]):  # the beginning is what other prompts share: it goes last
            self._blocks.move_to_end(key)
        self.hits += len(found)
        self.misses += len(keys) - len(found)
        return found

    def wants(self, key: bytes) -> bool:
        """Whether the block is worth cutting out."""
        return self.budget > 0 and key not in self._blocks

    def add(self, key: bytes, block: Block) -> None:
        """Keeps a block and drops old ones until it fits."""
        self._blocks[key] = block
        self.bytes += _size(block)
        while self.bytes > self.budget:
            _, dropped = self._blocks.popitem(last=False)
            self.bytes -= _size(dropped)


def _size(block: Block) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(block))
