"""Tango's bounds against the likelihood maximised numerically, published values, and properties of any score test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from lorakit.statistics import paired_interval
from lorakit.statistics._paired import tango_bounds
from lorakit.statistics._tango import p_value_greater, reference_only_probability, score

TABLES = [
    (5, 12, 500),
    (12, 5, 500),
    (0, 3, 50),
    (3, 0, 50),
    (1, 7, 21),
    (40, 20, 160),
    (1, 1, 3),
    (0, 9, 10),
    (300, 310, 2000),
]


@st.composite
def tables(draw, largest=300):
    n = draw(st.integers(1, largest))
    b = draw(st.integers(0, n))
    return b, draw(st.integers(0, n - b)), n


def likelihood_q(b, c, n, difference):
    """The q in [max(0, −λ), (1 − λ)/2] that maximises b·log(q + λ) + c·log q + (n − b − c)·log(1 − λ − 2q)."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def slope(q):
        first = b / (q + difference) if b else 0.0
        second = c / q if c else 0.0
        return first + second - (2 * (n - b - c) / (1 - difference - 2 * q) if n > b + c else 0.0)

    width = high - low
    inner = low + 1e-13 * width, high - 1e-13 * width
    if slope(inner[0]) <= 0:
        return low
    if slope(inner[1]) >= 0:
        return high
    return optimize.brentq(slope, *inner, xtol=1e-16)


def likelihood_score(b, c, n, difference):
    q = likelihood_q(b, c, n, difference)
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("b", "c", "n"), TABLES)
@pytest.mark.parametrize("difference", [-0.7, -0.1, -0.01, 0.0, 0.004, 0.2, 0.9])
def test_closed_form_is_the_constrained_maximum_of_the_likelihood(b, c, n, difference):
    assert reference_only_probability(b, c, n, difference) == pytest.approx(likelihood_q(b, c, n, difference), abs=1e-8)
    if likelihood_q(b, c, n, difference) > 1e-9 or difference:
        assert score(b, c, n, difference) == pytest.approx(likelihood_score(b, c, n, difference), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.025, 0.05, 0.2])
@pytest.mark.parametrize(("b", "c", "n"), TABLES)
def test_bounds_solve_the_score_equation_of_the_numerical_likelihood(b, c, n, alpha):
    z = stats.norm.isf(alpha)
    lower, upper = tango_bounds(b, c, n, alpha)
    assert likelihood_score(b, c, n, lower) == pytest.approx(z, rel=1e-6)
    assert likelihood_score(b, c, n, upper) == pytest.approx(-z, rel=1e-6)


def test_bounds_of_published_and_documented_examples():
    assert tango_bounds(5, 12, 500, 0.05)[0] == pytest.approx(-0.029265, abs=5e-7)
    # Bentur et al. 2009, as analysed by Fagerland, Lydersen and Laake, Statistics in Medicine 33, 2014.
    assert tango_bounds(1, 7, 21, 0.025) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("n", [1, 2, 50, 268, 10**6])
def test_bounds_without_a_discordant_pair_have_a_closed_form(n):
    z2 = stats.norm.isf(0.05) ** 2
    assert tango_bounds(0, 0, n, 0.05) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-12)


@pytest.mark.parametrize("n", [1, 7, 400])
def test_bounds_where_every_pair_is_discordant_one_way(n):
    z2 = stats.norm.isf(0.05) ** 2
    lower, upper = tango_bounds(n, 0, n, 0.05)
    assert upper == 1
    assert lower == pytest.approx((n - z2) / (n + z2), rel=1e-12)
    if n > 1:
        assert likelihood_score(n, 0, n, lower) == pytest.approx(math.sqrt(z2), rel=1e-6)


def test_268_documents_are_the_fewest_that_can_pass_at_one_point_and_133_at_two():
    for fewest, margin in [(268, 0.01), (133, 0.02)]:
        assert tango_bounds(0, 0, fewest, 0.05)[0] > -margin
        assert tango_bounds(0, 0, fewest - 1, 0.05)[0] < -margin


@settings(deadline=None)
@given(tables(), st.floats(0.001, 0.5))
def test_swapping_the_sides_swaps_and_negates_the_bounds(table, alpha):
    b, c, n = table
    lower, upper = tango_bounds(b, c, n, alpha)
    assert (-upper, -lower) == tango_bounds(c, b, n, alpha)


@pytest.mark.slow
@settings(deadline=None)
@given(tables(), st.floats(1e-6, 0.5), st.floats(1e-6, 0.5))
def test_bounds_contain_the_difference_and_shrink_as_alpha_grows(table, first, second):
    b, c, n = table
    wide, narrow = (tango_bounds(b, c, n, alpha) for alpha in sorted([first, second]))
    assert -1 <= wide[0] <= narrow[0] + 1e-12
    assert narrow[0] <= (b - c) / n <= narrow[1]
    assert narrow[1] - 1e-12 <= wide[1] <= 1


def test_alpha_within_rounding_of_one_half_gives_the_difference():
    alpha = math.nextafter(0.5, 0)
    for n in range(1, 25):
        for b in range(n):
            lower, upper = tango_bounds(b, n - 1 - b, n, alpha)
            assert (lower, upper) == pytest.approx(((2 * b + 1 - n) / n,) * 2, abs=1e-12)


@pytest.mark.slow
@settings(deadline=None)
@given(tables(100_000_000), st.sampled_from([0.5 - 1e-12, 0.05, 1e-12]))
def test_bounds_of_huge_and_lopsided_tables_solve_the_equation(table, alpha):
    b, c, n = table
    lower, upper = tango_bounds(b, c, n, alpha)
    assert -1 <= lower <= (b - c) / n <= upper <= 1
    z = stats.norm.isf(alpha)
    if -1 < lower < (b - c) / n - 1e-6 and b < n:
        assert score(b, c, n, lower) == pytest.approx(z, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_score_falls_with_the_difference_and_bounds_invert_it(n):
    grid = np.linspace(-0.999, 0.999, 1999)
    z = stats.norm.isf(0.05)
    for b in range(n + 1):
        for c in range(n + 1 - b):
            values = score(b, c, n, grid)
            assert (np.diff(values) <= 1e-9).all(), (b, c)
            lower, upper = tango_bounds(b, c, n, 0.05)
            clear = np.abs(np.abs(values) - z) > 1e-9
            assert ((lower <= grid) == (values <= z))[clear].all(), (b, c)
            assert ((upper >= grid) == (values >= -z))[clear].all(), (b, c)


@settings(deadline=None)
@given(tables(), st.floats(-1.2, 1.2), st.sampled_from([0.01, 0.05, 0.3]))
def test_p_value_is_below_alpha_where_the_bound_clears_the_threshold(table, threshold, alpha):
    b, c, n = table
    lower = tango_bounds(b, c, n, alpha)[0]
    p = p_value_greater(b, c, n, threshold)
    assert 0 <= p <= 1
    if abs(lower - threshold) > 1e-9:
        assert (p < alpha) == (lower > threshold)


@pytest.mark.parametrize(
    ("threshold", "greater", "less"), [(-1.0, 0.0, 1.0), (-1.5, 0.0, 1.0), (1.0, 1.0, 0.0), (1.5, 1.0, 0.0)]
)
def test_p_value_at_differences_that_are_impossible_or_extreme(threshold, greater, less):
    interval = paired_interval([1, 0, 1], [1, 1, 1])
    assert interval.p_value(threshold) == greater
    assert interval.p_value(threshold, alternative="less") == less
