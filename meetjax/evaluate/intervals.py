"""Intervals for what was measured: Wilson's for accuracies, the bootstrap for means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from meetjax.errors import MeetjaxError


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval (for z = 1.96) of an accuracy; both ends are fractions in [0, 1].

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n), p = successes / n.
    Wilson (1927), J. Am. Stat. Assoc. 22. `successes` may be fractional: a tie counts one half, which only makes the interval
    wider than it need be. Raises MeetjaxError when n < 1 or successes lie outside [0, n].
    """
    if n < 1:
        raise MeetjaxError("accuracy interval: n", expected="at least 1 held-out row", found=n, fix="hold out more rows")
    if not 0 <= successes <= n:
        raise MeetjaxError("accuracy interval: successes", expected=f"a number in [0, {n}]", found=successes)
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At p = 0 and p = 1 the exact ends are 0 and 1; rounding must not push them out or leave the point estimate outside.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def bootstrap_mean(values: Sequence[float], seed: int, n: int = 2000) -> tuple[float, float, float]:
    """(mean, lo, hi) of `values`: the 2.5 % and 97.5 % quantiles of `n` means of rows drawn with replacement.

    The percentile bootstrap of Efron (1979). The unit of `values` is that of the result; the same seed gives the same interval.
    Raises MeetjaxError for no values or one that is not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or rows.size == 0:
        raise MeetjaxError("bootstrap interval: values", expected="at least one number in one row", found=f"shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise MeetjaxError(f"bootstrap interval: value {int(np.argmin(np.isfinite(rows)))}", expected="finite", found="nan or inf")
    rng = np.random.default_rng(seed)
    # One resample at a time: an [n, len(values)] index matrix would be gigabytes for a large held-out set.
    means = [rows[rng.integers(0, rows.size, rows.size)].mean() for _ in range(n)]
    lo, hi = np.quantile(means, (0.025, 0.975))
    return float(rows.mean()), float(lo), float(hi)
