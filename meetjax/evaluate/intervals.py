"""Intervals for what was measured: Wilson's for accuracies, the bootstrap for means and other numbers of a set of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

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
    """(mean, lo, hi) of `values`, by `bootstrap`. The unit of `values` is that of the result.

    Raises MeetjaxError for no values or one that is not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or rows.size == 0:
        raise MeetjaxError("bootstrap interval: values", expected="at least one number in one row", found=f"shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise MeetjaxError(f"bootstrap interval: value {int(np.argmin(np.isfinite(rows)))}", expected="finite", found="nan or inf")
    return bootstrap(lambda index: rows[index].mean(), rows.size, seed, n)


def bootstrap(statistic: Callable[[Int[np.ndarray, " N"]], float], size: int, seed: int, n: int = 2000) -> tuple[float, float, float]:
    """(value, lo, hi) of a statistic of `size` rows: the 2.5 % and 97.5 % quantiles of its `n` values on rows drawn with replacement.

    statistic: of the rows at these indices, int[size]. The percentile bootstrap of Efron (1979); the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    # One resample at a time: an [n, size] index matrix would be gigabytes for a large held-out set.
    drawn = [statistic(rng.integers(0, size, size)) for _ in range(n)]
    lo, hi = np.quantile(drawn, (0.025, 0.975))
    return float(statistic(np.arange(size))), float(lo), float(hi)
