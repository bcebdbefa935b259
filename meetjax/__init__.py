"""meetjax: parameter-efficient alignment of language models in JAX; small trained trees on a frozen base, each with a dial."""

from meetjax.models.decoder import apply as apply
from meetjax.models.load import Model as Model
from meetjax.models.load import load as load

__version__ = "0.1.0"
