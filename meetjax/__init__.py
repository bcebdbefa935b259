"""meetjax: parameter-efficient alignment of language models in JAX."""
