"""`load`: one call from a name to a model that can be applied."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from meetjax.models import gguf, hf
from meetjax.models.config import ModelConfig
from meetjax.models.fingerprint import fingerprint, sample
from meetjax.models.quant import Quantize, check_quantize, quantize_leaf, tile_of
from meetjax.models.sites import LINEAR
from meetjax.models.sources import find_source
from meetjax.models.weights import Shardings, place
from meetjax.types import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """A base model: its shape, its weights (tree of `sites.shapes(config)`), a transformers tokenizer and its identity.

    quantize: how the linear weights are held; the fingerprint is that of the weights before, so that an adapter trained on either fits.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Any
    fingerprint: str
    quantize: Quantize = "none"


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    shardings: Shardings | None = None,
    quantize: Quantize = "none",
) -> Model:
    """Loads a Llama, Mistral or Qwen2 decoder from a Hugging Face folder, a hub id, a `.gguf` file or the built-in name.

    dtype: of every leaf, "float32" or "bfloat16". shardings: tree of NamedSharding with the structure of `sites.shapes(config)`,
    or a function of the config that makes it; each device then reads only its part of safetensors files. mesh alone: replicated.
    Neither: the default device. quantize: "int8" or "int4" for the linear sites of the blocks, made leaf by leaf
    as they are read. Raises MeetjaxError for a source that cannot be found, fetched, read or recognised.
    """
    check_quantize(quantize)
    found = find_source(source)
    checkpoint = gguf.open_file(found.path, found.name) if found.is_gguf else hf.open_folder(found.path, found.name)
    tokenizer = checkpoint.make_tokenizer()  # before the weights: cheap, and it may fail
    samples: dict[str, Any] = {}

    def each(path: str, leaf: Any) -> Any:
        site = path.removeprefix("blocks/")
        if quantize == "none" or site not in LINEAR:
            return leaf
        samples[path] = sample(path, leaf)
        return quantize_leaf(leaf, quantize, tile_of(site, quantize))

    params = place(checkpoint, dtype, mesh, shardings, each)
    return Model(checkpoint.name, checkpoint.config, params, tokenizer, fingerprint(checkpoint.config, params, samples), quantize)
