"""One table: every leaf of the base, its axes, and its names in Hugging Face, PEFT and GGUF files.

Shapes, initialisers, sharding, parameter counts, loaders, exporters and error messages are computed from it.
"""

from __future__ import annotations

import dataclasses

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Site:
    """One leaf. `axes` are logical axes in storage order, the layer axis left out; two axes (in, out) make a linear site."""

    name: str
    axes: tuple[str, ...]
    hf: str
    gguf: str
    bias_of: str | None = None

    @property
    def linear(self) -> bool:
        return len(self.axes) == 2 and self.name not in ("embed", "head")


BLOCK = {
    site.name: site
    for site in (
        Site("attn_norm", ("embed",), "input_layernorm.weight", "attn_norm.weight"),
        Site("q", ("embed", "heads"), "self_attn.q_proj.weight", "attn_q.weight"),
        Site("k", ("embed", "kv"), "self_attn.k_proj.weight", "attn_k.weight"),
        Site("v", ("embed", "kv"), "self_attn.v_proj.weight", "attn_v.weight"),
        Site("o", ("heads", "embed"), "self_attn.o_proj.weight", "attn_output.weight"),
        Site("mlp_norm", ("embed",), "post_attention_layernorm.weight", "ffn_norm.weight"),
        Site("gate", ("embed", "ffn"), "mlp.gate_proj.weight", "ffn_gate.weight"),
        Site("up", ("embed", "ffn"), "mlp.up_proj.weight", "ffn_up.weight"),
        Site("down", ("ffn", "embed"), "mlp.down_proj.weight", "ffn_down.weight"),
    )
}
for _site in [site for site in BLOCK.values() if site.linear]:
    _names = (name.removesuffix("weight") + "bias" for name in (_site.hf, _site.gguf))
    BLOCK[f"{_site.name}_bias"] = Site(f"{_site.name}_bias", _site.axes[1:], *_names, bias_of=_site.name)
TOP = {
    site.name: site
    for site in (
        Site("embed", ("vocab", "embed"), "model.embed_tokens.weight", "token_embd.weight"),
        Site("norm", ("embed",), "model.norm.weight", "output_norm.weight"),
        Site("head", ("embed", "vocab"), "lm_head.weight", "output.weight"),
    )
}
LINEAR = tuple(name for name, site in BLOCK.items() if site.linear)
"""q k v o gate up down: where `lora` may act."""
EDITABLE = ("q", "k", "v", "o", "down")
"""Where `edit` may act; `down` alone is RED, all five are RED+."""


def block_sites(config: ModelConfig) -> dict[str, Site]:
    """The leaves of one block of this model."""
    return {name: site for name, site in BLOCK.items() if site.bias_of is None or site.bias_of in config.biases}


def top_sites(config: ModelConfig) -> dict[str, Site]:
    """The leaves outside the blocks."""
    return {name: site for name, site in TOP.items() if name != "head" or not config.tied_head}


def shape(config: ModelConfig, site: Site) -> tuple[int, ...]:
    """Shape of a leaf, the layer axis left out."""
    return tuple(config.sizes[axis] for axis in site.axes)


def shapes(config: ModelConfig) -> dict:
    """Tree of shapes of the base with stacked blocks: {'embed', 'blocks': {site: (L, ...)}, 'norm', 'head'?}."""
    blocks = {name: (config.layers, *shape(config, site)) for name, site in block_sites(config).items()}
    return {name: shape(config, site) for name, site in top_sites(config).items()} | {"blocks": blocks}


def logical_axes(config: ModelConfig) -> dict:
    """The same tree with logical axis names, 'layers' first for blocks."""
    blocks = {name: ("layers", *site.axes) for name, site in block_sites(config).items()}
    return {name: site.axes for name, site in top_sites(config).items()} | {"blocks": blocks}


def check_sites(kind: str, sites: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Returns `sites` in table order. Raises MeetjaxError for an empty list or a site where `kind` cannot act."""
    unknown = [site for site in sites if site not in allowed]
    if unknown or not sites:
        raise MeetjaxError(
            f"{kind}: {'unknown site ' + unknown[0] if unknown else 'no site given'}",
            expected="some of " + ", ".join(allowed),
            found=", ".join(sites) or "none",
            fix=f"correct the sites of {kind}",
        )
    return tuple(site for site in BLOCK if site in sites)
