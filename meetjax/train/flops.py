"""The floating-point operations that a training step cannot do without, counted by hand: compilers count the body of a loop once."""

from __future__ import annotations

import math

from meetjax.models import sites
from meetjax.models.config import ModelConfig


def step_flops(config: ModelConfig, tokens: int, seen: int, scored: int, base: bool = False) -> float:
    """FLOPs of the forward pass and of the gradient of a step whose adapters (`base`: whose base, too) train.

    tokens: distinct ones, a shared prompt's counted once; seen: keys, summed over all tokens; scored: answer tokens, which alone meet the
    head. A product costs 2 a weight and token, as much again for the gradient in its input, and again in a weight that trains;
    attention's two products have two inputs each. What adapters, norms and the optimiser need is left out: less than a hundredth.
    """
    weights = config.layers * sum(math.prod(sites.shape(config, site)) for site in sites.block_sites(config).values() if site.linear)
    head = config.vocab * config.width
    attention = 3 * 4 * seen * config.layers * config.heads * config.head_width
    return (6 if base else 4) * (weights * tokens + head * scored) + attention
