"""Answers to other prompts, from which KTO's loss estimates how far the policy has moved."""

from __future__ import annotations

import dataclasses

import numpy as np

from meetjax.data.tokenize import Rows, answer_ids, make_rows
from meetjax.errors import MeetjaxError


def with_partners(rows: Rows, max_length: int, seed: int = 0) -> Rows:
    """Rows of one answer, each with the answer of another row, to another prompt, as its second one.

    Rows are put in a seeded order and each takes the answer of the next one that has another prompt: the cyclic shift of
    Ethayarajh et al. (2024), arXiv 2402.01306, sec. 4.1, over the whole set and not over a batch, so that a row's partner, and with
    it the partner's reference score, is always the same. A partner's answer is cut at its end to fit within `max_length`
    tokens. Raises MeetjaxError for rows of several answers and when all prompts are the same.
    """
    count, answers = rows.starts.shape
    if answers != 1:
        raise MeetjaxError("partners", expected="rows of one answer", found=answers)
    prompts = [answer_ids(rows, n, 0)[: rows.starts[n, 0]] for n in range(count)]
    names = [prompt.tobytes() for prompt in prompts]
    if len(set(names)) < 2:
        raise MeetjaxError("partners", expected="at least two different prompts", found=len(set(names)))
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, np.int64)
    for i, n in enumerate(order):
        step = next(step for step in range(1, count) if names[order[(i + step) % count]] != names[n])
        partner[n] = order[(i + step) % count]
    kept = []
    for n, other in enumerate(partner.tolist()):
        borrowed = answer_ids(rows, other, 0)[rows.starts[other, 0] :][: max(max_length - len(prompts[n]), 1)]
        sides = [answer_ids(rows, n, 0), np.concatenate([prompts[n], borrowed])]
        kept.append((int(rows.records[n]), sides, [len(prompts[n])] * 2))
    return dataclasses.replace(make_rows(kept), classes=rows.classes, gates=rows.gates, shared_prompt=rows.shared_prompt)
