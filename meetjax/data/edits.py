"""Which tokens of a revision are new and which of the original it dropped, for losses that weigh tokens (FIGA)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from meetjax.data.tokenize import Rows, answer_ids
from meetjax.errors import MeetjaxError


def changed_tokens(
    original: Int[np.ndarray, " n"], revised: Int[np.ndarray, " m"]
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " m"]]:
    """(deleted or substituted tokens of the original, inserted or substituted tokens of the revision), by a least edit script.

    Levenshtein (1966). Of equally short scripts the one that substitutes, then deletes, at the latest places.
    """
    dropped, new = np.zeros(len(original), bool), np.zeros(len(revised), bool)
    shorter = min(len(original), len(revised))
    differ = np.flatnonzero(original[:shorter] != revised[:shorter])
    front = int(differ[0]) if len(differ) else shorter
    differ = np.flatnonzero(original[::-1][: shorter - front] != revised[::-1][: shorter - front])
    back = int(differ[0]) if len(differ) else shorter - front
    a, b = original[front : len(original) - back], revised[front : len(revised) - back]
    place = np.arange(len(b) + 1)
    cost = np.empty((len(a) + 1, len(b) + 1), np.int64)
    cost[0] = place
    for i, token in enumerate(a, start=1):
        best = np.concatenate([[i], np.minimum(cost[i - 1, 1:] + 1, cost[i - 1, :-1] + (b != token))])
        cost[i] = np.minimum.accumulate(best - place) + place  # insertions, all of a row at once
    i, j = len(a), len(b)
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            dropped[front + i] = new[front + j] = a[i] != b[j]
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            dropped[front + i] = True
        else:
            j -= 1
            new[front + j] = True
    return dropped, new


def with_edit_weights(rows: Rows) -> Rows:
    """Rows of (revised, original) with `token_weights`: 1 on new tokens of the revision and its EOS, -1 on dropped ones, else 0.

    Guo et al. (2023), arXiv 2311.04072, as released. Raises MeetjaxError for rows of other than two answers.
    """
    count, answers = rows.starts.shape
    if answers != 2:
        raise MeetjaxError("edit weights", expected="rows of a revised and an original answer", found=f"{answers} answers")
    weights = np.zeros(len(rows.ids), np.float32)
    for n in range(count):
        revised, original = (answer_ids(rows, n, c)[rows.starts[n, c] : -1] for c in range(2))
        dropped, new = changed_tokens(original, revised)
        for c, signed in enumerate((np.append(new, True).astype(np.float32), -np.append(dropped, False).astype(np.float32))):
            begin = rows.offsets[n, c] + rows.starts[n, c]
            weights[begin : begin + len(signed)] = signed
    return dataclasses.replace(rows, token_weights=weights)
