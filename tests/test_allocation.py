"""Ranks under a budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.allocation import allocate, read_budget

SPECTRA = st.lists(
    st.tuples(st.lists(st.floats(0, 1e3), min_size=1, max_size=5), st.integers(1, 9)), min_size=1, max_size=6
)


def energy(spectra, ranks):
    return sum(sum(v**2 for v in sorted(s, reverse=True)[: ranks[name]]) for name, s in spectra.items())


@given(modules=SPECTRA, extra=st.integers(0, 100), max_rank=st.none() | st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_never_over_budget_never_out_of_bounds_and_the_same_each_time(modules, extra, max_rank):
    spectra = {str(i): s for i, (s, _) in enumerate(modules)}
    costs = {str(i): cost for i, (_, cost) in enumerate(modules)}
    budget = sum(costs.values()) + extra
    ranks = allocate(spectra, costs, budget, max_rank=max_rank)
    spent = sum(ranks[name] * costs[name] for name in ranks)
    assert spent <= budget
    for name, rank in ranks.items():
        limit = len(spectra[name]) if max_rank is None else min(len(spectra[name]), max_rank)
        assert 1 <= rank <= limit
        # nothing worth taking that still fits was left
        left = sorted(spectra[name], reverse=True)[rank:limit]
        peak = max(map(max, spectra.values())) or 1.0
        assert not left or (left[0] / peak) ** 2 == 0 or spent + costs[name] > budget
    assert ranks == allocate(spectra, costs, budget, max_rank=max_rank)
    scaled = {name: [1e-3 * v for v in s] for name, s in spectra.items()}
    if all(v == 0 or v > 1e-100 for s in spectra.values() for v in s):
        assert energy(spectra, allocate(scaled, costs, budget, max_rank=max_rank)) == pytest.approx(
            energy(spectra, ranks)
        )


@given(
    spectra=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=1, max_size=3),
    units=st.integers(0, 6),
)
@settings(max_examples=100, deadline=None)
def test_at_equal_costs_greedy_is_the_best_there_is(spectra, units):
    spectra = {str(i): [float(v) for v in s] for i, s in enumerate(spectra)}
    budget = 7 * (len(spectra) + units)
    ranks = allocate(spectra, dict.fromkeys(spectra, 7), budget)
    choices = itertools.product(*(range(1, len(s) + 1) for s in spectra.values()))
    best = max(
        energy(spectra, dict(zip(spectra, choice, strict=True))) for choice in choices if 7 * sum(choice) <= budget
    )
    assert energy(spectra, ranks) == pytest.approx(best)


def test_ties_go_to_the_first_and_what_does_not_fit_is_skipped():
    assert allocate({"a": [2, 1], "b": [2, 1]}, {"a": 1, "b": 1}, 3) == {"a": 2, "b": 1}
    assert allocate({"a": [9, 9], "b": [1, 1]}, {"a": 10, "b": 2}, 16) == {"a": 1, "b": 2}
    assert allocate({"a": [3, 0, 0], "b": [1]}, {"a": 1, "b": 1}, 100) == {"a": 1, "b": 1}
    assert allocate({"a": [0.0]}, {"a": 1}, 5, min_rank=0) == {"a": 0}
    assert allocate({"a": [1.0, 2.0, 3.0]}, {"a": 1}, 5, max_rank=2) == {"a": 2}
    assert allocate({}, {}, 0) == {}


def test_bad_arguments_say_what_is_needed():
    with pytest.raises(ValueError, match=r"`budget` must cover rank 2 in all 2 modules \(at least 22\); got 20"):
        allocate({"a": [1, 1], "b": [1, 1]}, {"a": 10, "b": 1}, 20, min_rank=2)
    with pytest.raises(ValueError, match="`rule` must be one of energy; got 'other'"):
        allocate({"a": [1]}, {"a": 1}, 1, rule="other")
    with pytest.raises(ValueError, match="same modules"):
        allocate({"a": [1]}, {"b": 1}, 1)
    with pytest.raises(ValueError, match="`min_rank`"):
        allocate({"a": [1]}, {"a": 1}, 9, min_rank=3, max_rank=2)
    with pytest.raises(ValueError, match="`costs`"):
        allocate({"a": [1]}, {"a": 0}, 9)


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        (5, (5, "parameters")),
        ("2M", (2_000_000, "parameters")),
        ("1.5k", (1500, "parameters")),
        ("4MB", (4_000_000, "bytes")),
        ("4 MiB", (4 * 2**20, "bytes")),
        ("10b", (10, "bytes")),
    ],
)
def test_budgets_as_people_write_them(given_, meant):
    assert read_budget(given_) == meant


@pytest.mark.parametrize("given_", [0, -1, "", "M", "1e400", "many", "0.2", True, 2.5, None, "5 TB"])
def test_budgets_that_are_none(given_):
    with pytest.raises(ValueError, match="`budget` must be a positive number of parameters"):
        read_budget(given_)
