"""How far a model has moved from its base, on the answers that it gives itself, and how long they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from meetjax.adapters.tree import Bank
from meetjax.data.loader import choose_buckets, eval_batches
from meetjax.data.records import Prompt
from meetjax.data.tokenize import make_rows
from meetjax.evaluate.curves import answer_positions, compare, forward
from meetjax.evaluate.intervals import bootstrap_mean
from meetjax.generate.requests import Request, Template, generate_texts
from meetjax.generate.sampling import Sampling
from meetjax.models.load import Model


def drift(
    model: Model,
    base: Model,
    bank: Bank | None,
    prompts: Sequence[Prompt],
    *,
    gates: tuple[float, ...] | None = None,
    marker: str = "",
    template: Template = "auto",
    max_new_tokens: int = 128,
    batch_size: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """{"kl", "kl_interval", "mean_tokens", "mean_tokens_interval"} over one answer to each prompt, sampled at temperature 1.

    kl: sum over the answer's tokens of KL(model || base) over the vocabulary, in nats an answer, which estimates the divergence of
    the answers without bias, up to where they are cut at `max_new_tokens`. Intervals are 95 % bootstraps over prompts.
    """
    sampling = Sampling(temperature=1.0)
    requests = [Request(prompt, gates=gates, marker=marker, sampling=sampling, seed=seed + i) for i, prompt in enumerate(prompts)]
    answers = generate_texts(model, requests, adapters=bank, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template)
    rows = make_rows([(i, [np.array([*answer.prompt, *answer.ids], np.int32)], [len(answer.prompt)]) for i, answer in enumerate(answers)])
    if gates is not None:
        rows = dataclasses.replace(rows, gates=np.tile(np.asarray(gates, np.float32), (len(rows), 1)))
    moved = np.zeros(len(rows))
    for batch, chosen in eval_batches(rows, 4, choose_buckets(rows, count=3)):
        answer, targets, positions = answer_positions(batch)
        ours, theirs = (positions(forward(side.config, side.params, own, batch)) for side, own in ((model, bank), (base, None)))
        _, kl = compare(model.params, base.params, ours, theirs, targets)
        np.add.at(moved, chosen[answer], np.asarray(kl)[: len(answer)])
    kl, *kl_interval = bootstrap_mean(moved.tolist(), seed)
    tokens, *tokens_interval = bootstrap_mean([answer.tokens for answer in answers], seed)
    return {"kl": kl, "kl_interval": kl_interval, "mean_tokens": tokens, "mean_tokens_interval": tokens_interval}
