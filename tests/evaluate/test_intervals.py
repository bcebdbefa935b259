"""Wilson's interval against published and recomputed values; the bootstrap against the normal interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meetjax.errors import MeetjaxError
from meetjax.evaluate.intervals import bootstrap_mean, wilson


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [  # the first four: Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (1 - 0.1170, 1.0)),
        (25, 50, (0.3664, 0.6336)),
    ],
)
def test_wilson_known_values(successes, n, expected):
    assert wilson(successes, n) == pytest.approx(expected, abs=6e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_contains_the_estimate_and_stays_in_range(case):
    halves, n = case
    lo, hi = wilson(halves / 2, n)
    assert 0 <= lo <= halves / 2 / n <= hi <= 1
    assert hi - lo > 0
    mirrored = wilson(n - halves / 2, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((lo, hi), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5), (math.nan, 5)])
def test_wilson_refuses(successes, n):
    with pytest.raises(MeetjaxError, match="accuracy interval"):
        wilson(successes, n)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, lo, hi = bootstrap_mean(values, seed=0)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    # 2000 resamples place a 2.5 % quantile to about 0.07 standard errors, half is 1.96 of them.
    assert (lo, hi) == pytest.approx((mean - half, mean + half), abs=0.15 * half)


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap_mean([2.5] * 7, seed=0) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0, 2.0]]])
def test_bootstrap_refuses(values):
    with pytest.raises(MeetjaxError, match="bootstrap interval"):
        bootstrap_mean(values, seed=0)
