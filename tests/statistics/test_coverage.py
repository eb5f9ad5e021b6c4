"""How often each one-sided bound covers the true difference: binary scores by enumeration, others by simulation.

Tango's lower bound covers λ where Z(λ) <= z, and its upper one where Z(λ) >= −z (test_tango.py checks that), so the
counts (b, c) are enumerated without solving for any bound. Coverage depends on the probabilities of the discordant
outcomes alone; the reference's accuracy says which of these are possible.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from lorakit.statistics import paired_interval, seeds_interval
from lorakit.statistics._tango import score

pytestmark = pytest.mark.slow  # exact enumeration over many cells

ALPHA = 0.05
Z = stats.norm.isf(ALPHA)
SIZES = (50, 100, 200, 500, 1000, 2000)
ACCURACIES = (0.5, 0.8, 0.95)
DISCORDANCES = (0, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
LOSSES = (0, 0.005, 0.01, 0.02, 0.03, 0.05)  # the true difference is minus this, or plus
MISSED_MASS = 1e-8


def feasible_cells():
    """(n, discordance, difference) that some accuracy allows, each once."""
    cells = set()
    for n, accuracy, discordance, loss in itertools.product(SIZES, ACCURACIES, DISCORDANCES, LOSSES):
        for difference in {loss, -loss}:
            candidate_only, reference_only = (discordance + difference) / 2, (discordance - difference) / 2
            if min(candidate_only, reference_only) < -1e-12:
                continue
            if candidate_only <= 1 - accuracy + 1e-12 and reference_only <= accuracy + 1e-12:
                cells.add((n, discordance, difference))
    return sorted(cells)


def window(n, probability):
    return np.arange(stats.binom.ppf(1e-10, n, probability), stats.binom.isf(1e-10, n, probability) + 1).clip(0)


def coverage(n, discordance, difference):
    """Exact coverage of the lower and upper bound; probability not enumerated counts as not covered."""
    p12, p21 = max((discordance + difference) / 2, 0), max((discordance - difference) / 2, 0)
    b, c = window(n, p12)[:, None], window(n, p21)[None, :]
    mass = stats.binom.pmf(b, n, p12) * stats.binom.pmf(c, n - b, min(p21 / (1 - p12), 1))
    assert 1 - mass.sum() < MISSED_MASS
    z = score(b, c, n, difference)
    return float(mass[z <= Z].sum()), float(mass[z >= -Z].sum())


@pytest.fixture(scope="module")
def covered():
    return {cell: coverage(*cell) for cell in feasible_cells()}


def test_the_cells_cover_what_is_feasible_and_no_more(covered):
    assert len(covered) > 600
    assert {n for n, _, _ in covered} == set(SIZES)
    assert all(abs(difference) <= discordance for _, discordance, difference in covered)
    assert {difference for _, _, difference in covered} == {s * loss for s in (1, -1) for loss in LOSSES}


def test_the_bound_that_decides_a_pass_covers_94_percent_everywhere(covered):
    # The lower bound where the candidate is no better, and by symmetry the upper one where it is no worse.
    low = {cell: lower for cell, (lower, _) in covered.items() if cell[2] <= 0 and lower < 0.94}
    high = {cell: upper for cell, (_, upper) in covered.items() if cell[2] >= 0 and upper < 0.94}
    assert not low
    assert not high


def test_with_20_discordant_pairs_expected_both_bounds_cover_94_to_97_percent(covered):
    both = {cell: bounds for cell, bounds in covered.items() if cell[0] * cell[1] >= 20 - 1e-9}
    assert len(both) > 300
    assert not {cell: bounds for cell, bounds in both.items() if min(bounds) < 0.94 or max(bounds) > 0.97}


def test_with_fewer_the_bound_that_decides_a_fail_can_cover_91_percent(covered):
    # A limit of Tango's method, stated in paired_interval: the upper bound of a true loss, where a few pairs mostly go
    # one way. It makes a false FAIL likelier than alpha, not a false PASS.
    short = {cell: min(bounds) for cell, bounds in covered.items() if min(bounds) < 0.94}
    assert 0.91 < min(short.values()) < 0.92
    assert max(n * discordance for n, discordance, _ in short) <= 12 + 1e-9
    assert all(difference != 0 for _, _, difference in short)


@pytest.mark.parametrize("n", SIZES)
def test_the_lowest_coverage_of_the_bound_that_decides_a_fail_is_as_documented(n):
    assert coverage(n, 4.75 / n, -0.65 * 4.75 / n)[1] == pytest.approx(0.905, abs=0.001)
    assert coverage(200, 0.1, -0.1)[1] == pytest.approx(0.933, abs=0.001)  # 20 pairs, all one way


@pytest.mark.slow
def test_enumeration_agrees_with_drawn_documents():
    cell = (100, 0.06, -0.03)
    rng = np.random.default_rng(0)
    reference = np.array([0, 1, 1])
    candidate = np.array([1, 0, 1])
    hits = np.zeros(2)
    draws = 1000
    for _ in range(draws):
        outcome = rng.choice(3, size=100, p=[0.015, 0.045, 0.94])
        interval = paired_interval(reference[outcome], candidate[outcome])
        hits += [interval.lower <= -0.03, interval.upper >= -0.03]
    assert hits / draws == pytest.approx(coverage(*cell), abs=4 * (0.08 * 0.92 / draws) ** 0.5)


DRAWS = 4000
TOLERANCE = 4 * (ALPHA * (1 - ALPHA) / DRAWS) ** 0.5  # four standard errors of a simulated coverage of 0.95


def simulated(interval_of_draw, truth, draws=DRAWS):
    rng = np.random.default_rng(12)
    intervals = [interval_of_draw(rng) for _ in range(draws)]
    lower = np.mean([interval.lower <= truth for interval in intervals])
    return lower, np.mean([interval.upper >= truth for interval in intervals])


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 40])
def test_t_bounds_cover_95_percent_of_normal_differences(n):
    def draw(rng):
        reference = rng.normal(0, 3, n)
        return paired_interval(reference, reference + rng.normal(-0.2, 1, n))

    assert simulated(draw, -0.2) == pytest.approx((0.95, 0.95), abs=TOLERANCE)


@pytest.mark.slow
def test_cluster_bounds_cover_95_percent_where_plain_t_bounds_do_not():
    groups = np.repeat(np.arange(20), 10)

    def difference(rng):
        return rng.normal(0, 1, 20)[groups] + rng.normal(0, 1, 200)

    clustered = simulated(lambda rng: paired_interval(np.zeros(200), difference(rng), groups=groups), 0.0)
    plain = simulated(lambda rng: paired_interval(np.zeros(200), difference(rng)), 0.0)
    assert clustered == pytest.approx((0.95, 0.95), abs=TOLERANCE)
    assert max(plain) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("seed_spread", "document_spread"), [(1.0, 0.0), (0.1, 1.0), (0.0, 1.0)])
def test_seeds_bounds_cover_at_least_95_percent(seed_spread, document_spread):
    def draw(rng):
        d = rng.normal(0, seed_spread, (3, 1)) + rng.normal(0, document_spread, (1, 100)) + rng.normal(0, 1, (3, 100))
        return seeds_interval(np.zeros((3, 100)), d)

    assert min(simulated(draw, 0.0)) > 0.95 - TOLERANCE


@pytest.mark.slow
def test_seeds_bounds_cover_binary_scores():
    def draw(rng):
        easy = rng.random(200) < 0.9
        wrong = rng.random((2, 3, 200)) < 0.02
        return seeds_interval(easy & ~wrong[0], easy & ~wrong[1])

    assert min(simulated(draw, 0.0, draws=800)) > 0.95 - 2.3 * TOLERANCE  # √5: a fifth of the draws
