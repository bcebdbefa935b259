"""The decoder: one definition for training (blocks stacked and scanned) and for decoding (blocks apart, each with its cache).

The rest of the library sees `init_params`, `unstack`, `unstack_bank`, `apply`, `hidden_states`, `block_states`, `prefill`, `extend` and
`decode_step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from meetjax.errors import MeetjaxError
from meetjax.models import layers, sites
from meetjax.models.attention import make_attend
from meetjax.models.bits import KEPT_ONLY, held, to_bits
from meetjax.models.config import ModelConfig
from meetjax.models.layout import Cells, Rows, make_cells, make_layout, make_step_layout, text_rows
from meetjax.models.quant import is_quantized
from meetjax.models.streams import Streams, block_gates, fan_out, kind_gates, make_streams, mix, repeat
from meetjax.types import Array, Params

REMAT_POLICIES = {"dots": KEPT_ONLY, "full": None}


def _initializer(site: sites.Site) -> Callable:
    if site.bias_of:
        return nn.initializers.zeros
    return nn.initializers.normal(0.02) if len(site.axes) == 2 else nn.initializers.ones


def _windowed(config: ModelConfig, layer: int) -> bool:
    return config.window_layers is None or layer in config.window_layers


def _leaf(module: nn.Module, config: ModelConfig, site: sites.Site) -> Any:
    """A parameter as Linen makes and checks it; a quantised one, a tree whose shape Linen cannot check, as it is given."""
    shape = sites.shape(config, site)
    given: Any = module.get_variable("params", site.name)
    if not is_quantized(given):
        return module.param(site.name, _initializer(site), shape)
    if given.shape != shape:
        raise MeetjaxError(f"params: leaf {site.name} of a block", expected=shape, found=given.shape)
    return given


class Block(nn.Module):
    """One decoder block; the arithmetic is `layers.block`.

    carry: the residual stream [B, T, D] and what was tapped of it so far [S + 1, B, T, D] or None; layer: what differs from layer
    to layer (`lora`, `edit`, `windowed`, `cache`, `tap`: where in the taps this block's output goes); shared: (layout, gates).
    """

    config: ModelConfig
    keep: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, carry: tuple[Array, Any], layer: dict[str, Any], shared: tuple) -> tuple[tuple[Array, Any], Any]:
        h, taps = carry
        table = sites.block_sites(self.config)
        params = {name: _leaf(self, self.config, site) for name, site in table.items()}

        def run(params: dict, bits: Array, h: Array, layer: dict[str, Any], shared: tuple) -> tuple[Array, Any]:
            layout, gates = shared
            attend = make_attend(layout, layer["windowed"], layer["cache"])
            h, cache = layers.block(
                self.config, params, layers.pin(self.config, held(bits, h)), layer["lora"], layer["edit"], gates, attend
            )
            return layers.pin(self.config, h), cache

        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        h, cache = run(params, to_bits(h), h, layer, shared)
        if taps is not None:
            taps = jax.lax.dynamic_update_index_in_dim(taps, h, layer["tap"], 0)
        return (h, taps), cache if self.keep else None


class Decoder(nn.Module):
    """Embedding, `enter` (soft prompts, identity blocks, streams), blocks, final norm.

    Returns normed hidden states [B*S, P+T, D]; with `keep`, the keys and values of every layer; and the residual stream behind
    each of `taps` blocks (0: in front of the first).
    """

    config: ModelConfig
    stacked: bool = True
    keep: bool = False
    taps: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], enter: Callable, bank: Any, caches: Any = None) -> tuple[Array, list, list]:
        config = self.config
        table = sites.top_sites(config)
        top = {name: self.param(name, _initializer(site), sites.shape(config, site)) for name, site in table.items()}
        h, shared = enter(layers.pin(config, layers.embed(config, top["embed"], tokens).astype(config.dtype)))
        windowed = [_windowed(config, i) for i in range(config.layers)]
        lora, edit = getattr(bank, "lora", None), getattr(bank, "edit", None)
        kept = []
        # What no one asked for goes to a spare place behind the last: a scan has no way to keep only some of its outputs.
        places = [self.taps.index(i + 1) if i + 1 in self.taps else len(self.taps) for i in range(config.layers)]
        taps = jnp.zeros((len(self.taps) + 1, *h.shape), h.dtype) if self.taps else None
        if taps is not None and 0 in self.taps:
            taps = taps.at[self.taps.index(0)].set(h)
        if self.stacked:
            scanned: Any = (0, nn.broadcast)
            scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=scanned, length=config.layers)
            layer = {"windowed": jnp.asarray(windowed), "lora": lora, "edit": edit, "cache": None, "tap": jnp.asarray(places)}
            (h, taps), _ = scan(config, remat=config.remat, name="blocks")((h, taps), layer, shared)
        else:
            for i in range(config.layers):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], {"lora": lora, "edit": edit}, is_leaf=lambda node: isinstance(node, tuple))
                layer = own | {"windowed": windowed[i], "cache": None if caches is None else caches[i], "tap": places[i]}
                (h, taps), cache = Block(config, self.keep, name=f"block_{i}")((h, taps), layer, shared)
                kept.append(cache)
        tapped = [] if taps is None else [taps[s] for s in range(len(self.taps))]
        return layers.rms_norm(h, top["norm"], config.norm_eps), kept, tapped


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters with stacked blocks: the tree of `sites.shapes`."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    layout = make_layout(config, text_rows(config, tokens))
    plain = dataclasses.replace(config, remat="none")
    made: Any = Decoder(plain).init(key, tokens, lambda h: (h, (layout, layers.Gates(None, None))), None)
    return made["params"]


def unstack(params: Params) -> Params:
    """The same parameters with one subtree a layer, for decoding (slicing a stack inside the loop costs twice the time)."""
    blocks = params["blocks"]
    count = jax.tree.leaves(blocks)[0].shape[0]
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    return rest | {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(count)}


def unstack_bank(bank: Any) -> Any:
    """The same bank, each leaf of LoRA and edits a tuple of layers, for decoding: a step would copy every slice it takes of a stack."""
    if bank is None:
        return None
    apart = {kind: jax.tree.map(lambda leaf: tuple(leaf), getattr(bank, kind)) for kind in ("lora", "edit")}
    return dataclasses.replace(bank, **apart)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values [B*S, K, P + capacity, H] of every layer and, per identity block, [B, K, P + capacity, H]; cells: of the B*S rows.

    Every row fills its own cells from the first on, whatever the others do, so rows may come and go.
    """

    blocks: list[tuple[Array, Array]]
    identity: dict[str, tuple[Array, Array]]
    cells: Cells


def _streams(bank: Any, gates: Array | None, dial: Array | None, enters: Array | None, rows: int) -> Streams:
    return make_streams(bank, gates, dial, rows) if enters is None else Streams(gates, None, (None,), enters)


def _forward(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    rows: Rows,
    bank: Any,
    gates: Array | None,
    dial: Array | None,
    cache: Cache | None = None,
    keep: bool = False,
    taps: tuple[int, ...] = (),
    enters: Array | None = None,
) -> tuple[Array, list, dict[str, tuple[Array, Array]], list]:
    """Normed hidden states of the text [B, T, D], streams mixed; (with keep) all keys and values; what was tapped."""
    streams = _streams(bank, gates, dial, enters, tokens.shape[0])
    if taps and len(streams.blocks) > 1:
        raise MeetjaxError("taps", expected="no logit dial, which mixes behind the last block only", found=f"{len(streams.blocks)} streams")
    identity_kept: dict[str, tuple[Array, Array]] = {}
    prompt = getattr(bank, "prompt", None)
    prompt_length = 0 if prompt is None or cache is not None else prompt.vectors.shape[0] * prompt.vectors.shape[1]

    def shared(every: int, of_gates: Array | None):
        """What all blocks share, for all streams (every 1) or for the first of each row."""
        if cache is None:
            of_rows = rows if every > 1 else jax.tree.map(lambda leaf: repeat(leaf, streams), rows)
            layout = make_layout(config, of_rows, prompt, kind_gates(bank, "prompt", of_gates))
        else:
            layout = make_step_layout(config, jax.tree.map(lambda leaf: leaf[::every], cache.cells), tokens.shape[1])
        return layout, block_gates(bank, of_gates)

    def enter(h: Array):
        if prompt is not None and prompt_length:
            vectors = prompt.vectors.astype(h.dtype).reshape(1, prompt_length, -1)
            h = layers.pin(config, jnp.concatenate([jnp.broadcast_to(vectors, (h.shape[0], *vectors.shape[1:])), h], axis=1))
        entered: dict[int | None, Array] = {None: h}
        if bank is not None and bank.identity is not None:
            layout, _ = shared(len(streams.blocks), gates)
            windowed = _windowed(config, 0)  # a copy of block 0 sees as far as block 0
            for entry in range(len(bank.identity.entries)):
                x = h
                for n in range(bank.identity.block["q"].shape[0]):
                    own = {name: leaf[n, entry] for name, leaf in bank.identity.block.items()}
                    name = f"{entry}.{n}"
                    attend = make_attend(layout, windowed, None if cache is None else cache.identity[name])
                    x, pair = layers.block(config, own, x, None, None, layers.Gates(None, None), attend)
                    if keep:
                        identity_kept[name] = pair
                entered[entry] = layers.pin(config, x)
        return layers.pin(config, fan_out(entered, streams)), shared(1, streams.gates)

    decoder = Decoder(config, stacked="blocks" in params, keep=keep, taps=taps)
    caches = None if cache is None else cache.blocks
    made: Any = decoder.apply({"params": params}, tokens, enter, bank, caches)
    h, kept, tapped = made
    return mix(h[:, prompt_length:], streams), kept, identity_kept, [x[:, prompt_length:] for x in tapped]


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    adapters: Any = None,
    gates: Float[Array, "B A"] | None = None,
    *,
    dial: Float[Array, " B"] | None = None,
    pad: Int[Array, " B"] | None = None,
    rows: Rows | None = None,
) -> Float[Array, "B T D"]:
    """Normed hidden states, the head's input; arguments as in `apply`."""
    return _forward(config, params, tokens, rows or text_rows(config, tokens, pad), adapters, gates, dial)[0]


def block_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    taps: tuple[int, ...],
    adapters: Any = None,
    gates: Float[Array, "B A"] | None = None,
    *,
    rows: Rows | None = None,
) -> list[Float[Array, "B T D"]]:
    """The residual stream behind each of `taps` blocks (0: the embeddings); blocks behind the last tap are not run.

    Raises MeetjaxError for a tap that is no block and for identity blocks that are dialled.
    """
    last = max(taps, default=0)
    if not 1 <= last <= config.layers or min(taps) < 0:
        raise MeetjaxError("taps", expected=f"0 to {config.layers}, one of them above 0", found=taps)
    short = dataclasses.replace(config, layers=last)
    cut = params | {"blocks": jax.tree.map(lambda leaf: leaf[:last], params["blocks"])}
    bank = adapters
    for kind in ("lora", "edit"):
        if getattr(adapters, kind, None) is not None:
            bank = dataclasses.replace(bank, **{kind: jax.tree.map(lambda leaf: leaf[:last], getattr(adapters, kind))})
    return _forward(short, cut, tokens, rows or text_rows(config, tokens), bank, gates, None, taps=taps)[3]


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    adapters: Any = None,
    gates: Float[Array, "B A"] | None = None,
    **options: Any,
) -> Float[Array, "B T V"]:
    """float32 logits of every position under the base `params` and a bank of `adapters`, row b's share of entry a being gates[b, a].

    adapters None is the base model, bit for bit; gates None means 1 everywhere. Text is padded on the right (no mask needed),
    or on the left with `pad` tokens a row, or laid out otherwise by `rows` (`layout.branched_rows`). `dial` [B] is the logit dial
    z = d z_adapted + (1 - d) z_base of decoding-time realignment (Liu et al. 2024, arXiv 2402.02992).
    """
    return layers.logits(params, hidden_states(config, params, tokens, adapters, gates, **options))


def prefill(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    capacity: int,
    adapters: Any = None,
    gates: Array | None = None,
    dial: Array | None = None,
    enters: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """Runs right-padded prompts of `lengths` tokens (unstacked params), soft prompts in front: the hidden state of each row's last
    token and a cache with room for `capacity` text tokens. enters: as in `extend`.
    """
    rows = text_rows(config, tokens)
    h, blocks, identity, _ = _forward(config, params, tokens, rows, adapters, gates, dial, keep=True, enters=enters)
    room = capacity - tokens.shape[1]
    blocks, identity = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), (blocks, identity))
    streams, prompt = _streams(adapters, gates, dial, enters, tokens.shape[0]), getattr(adapters, "prompt", None)
    own_rows, own_lengths = jax.tree.map(lambda leaf: repeat(leaf, streams), (rows, lengths))
    cells = make_cells(config, own_rows, own_lengths, capacity, prompt, kind_gates(adapters, "prompt", streams.gates))
    return _last(h, lengths), Cache(blocks, identity, cells)


def extend(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    cache: Cache,
    adapters: Any = None,
    gates: Array | None = None,
    dial: Array | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    enters: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """Runs T more tokens a row against the cache, each row from its own cell on: the last hidden state and the cache with them.

    lengths: how many of a row's T count (None: all); the cells of the rest are filled anew by what comes next. T more cells have
    to be free. enters: each row is one stream through this identity block, -1 for none, whatever its gate (None: gates and dial
    make the streams).
    """
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if lengths is None else lengths
    rows = text_rows(config, tokens)
    h, blocks, identity, _ = _forward(config, params, tokens, rows, adapters, gates, dial, cache, keep=True, enters=enters)
    own = repeat(count, _streams(adapters, gates, dial, enters, tokens.shape[0]))
    cells = dataclasses.replace(cache.cells, filled=cache.cells.filled + own, position=cache.cells.position + own)
    return _last(h, count), Cache(blocks, identity, cells)


def _last(h: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    return h[:, 0] if h.shape[1] == 1 else jnp.take_along_axis(h, lengths[:, None, None] - 1, axis=1)[:, 0]


def decode_step(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, " B"],
    cache: Cache,
    adapters: Any = None,
    gates: Array | None = None,
    dial: Array | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """`extend` by one token a row."""
    return extend(config, params, tokens[:, None], cache, adapters, gates, dial)
