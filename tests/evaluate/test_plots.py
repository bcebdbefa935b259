"""Labels keep apart, means are means, and a figure leaves no trace of where it was drawn."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meetjax.evaluate import plots

GAP = 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_spread_keeps_order_and_distance(heights):
    placed = plots.spread(heights, GAP)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(np.asarray(placed)[order])
    assert (gaps >= GAP - 1e-9).all()


def test_spread_leaves_alone_what_is_apart():
    assert plots.spread([0.9, 0.1, 0.5], GAP) == [0.9, 0.1, 0.5]
    assert np.allclose(plots.spread([0.5, 0.5], GAP), [0.45, 0.55])


def test_spread_shrinks_the_gap_when_crowded():
    assert np.allclose(sorted(plots.spread([0.5] * 5, 0.4)), np.linspace(0, 1, 5))


def test_trailing_mean_by_hand():
    assert np.allclose(plots.trailing_mean([1, 2, 3, 4, 5], 2), [1, 1.5, 2.5, 3.5, 4.5])
    assert np.allclose(plots.trailing_mean([1, 2, 3], 1), [1, 2, 3])


def test_trailing_mean_forgets_a_bad_value():
    assert np.allclose(plots.trailing_mean([1, np.nan, 3, 5], 2), [1, np.nan, np.nan, 4], equal_nan=True)


def test_svg_has_no_address_and_own_ids():
    curves = {"lora": ([-1, 0, 1], [3.0, 2.0, 1.0]), "edit": ([-1, 0, 1], [3.0, np.nan, np.nan])}
    svg = plots.to_svg(plots.against_strength(curves, "length (tokens)"), "length", "what it shows")
    assert svg.startswith('<svg viewBox="0 0 309.6 223.2" role="img" aria-label="what it shows">')
    assert not re.search(r"http|xmlns|DejaVu|<style|<metadata", svg)
    assert all(name.startswith("length-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert "var(--kind0)" in svg and "var(--kind1)" in svg and "var(--ink)" in svg


def test_heights_that_cannot_be_negative_start_at_zero():
    figure = plots.against_strength({"lora": ([0, 1], [40.0, 60.0])}, "length (tokens)")
    assert figure.axes[0].get_ylim()[0] == 0
    figure = plots.against_strength({"lora": ([0, 1], [-40.0, 60.0])}, "margin (nats)")
    assert figure.axes[0].get_ylim()[0] < -40
