"""Makes param_names.json: names, shapes and dtypes of the base and of a full bank for every tiny model.

Run from the repository root after a wanted change of names: `python -m tests.goldens.make_param_names`.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax

from meetjax.adapters.bank import init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.reward import RewardSpec
from meetjax.adapters.tree import flatten
from meetjax.models import sites
from meetjax.models.decoder import init_params

GOLDEN = Path(__file__).with_name("param_names.json")


class Ids:
    """A tokenizer as far as a soft prompt needs one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [5, 6, 7]


def describe(config) -> dict[str, dict[str, str]]:
    """{'params': {path: 'dtype[shape]'}, 'bank': the same for one adapter of every kind at every site}."""
    specs = (PromptSpec(length=4), LoraSpec(rank=2), EditSpec(sites.EDITABLE), IdentitySpec(), RewardSpec())

    def make(key):
        params = init_params(config, key)
        return params, init_bank(config, params, specs, Ids(), key)

    trees = dict(zip(("params", "bank"), jax.eval_shape(make, jax.random.key(0)), strict=True))
    return {
        name: {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in sorted(flatten(tree).items())}
        for name, tree in trees.items()
    }


if __name__ == "__main__":
    from tests.conftest import VARIANTS

    GOLDEN.write_text(json.dumps({name: describe(config) for name, config in VARIANTS.items()}, indent=1) + "\n")
