"""Sizes of masks under a budget, and shuffled controls."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.allocation import allocate_masks, shuffled
from lorakit.allocation.masks import envelope
from lorakit.errors import AllocationError

CURVE = st.dictionaries(st.integers(1, 12), st.integers(0, 20).map(float), min_size=1, max_size=6)
CURVES = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), CURVE, min_size=1)


@pytest.mark.slow
@given(curve=CURVE)
@settings(deadline=None)
def test_the_envelope_is_the_least_concave_rising_curve_above(curve):
    corners = envelope(curve)
    slopes = [(t - s) / (b - a) for (a, s), (b, t) in itertools.pairwise(corners)]
    assert all(slope > 0 for slope in slopes)
    assert slopes == sorted(set(slopes), reverse=True)
    assert all(curve[k] == s for k, s in corners)
    assert corners[0][0] == min(curve)
    assert corners[-1][1] == max(curve.values())
    for k, s in curve.items():  # no point lies above it
        for (a, low), (b, high) in itertools.pairwise(corners):
            if a <= k <= b:
                assert s <= low + (high - low) * (k - a) / (b - a) + 1e-9


@pytest.mark.slow
@given(curves=CURVES, rest=st.integers(0, 40))
@settings(deadline=None)
def test_ks_are_of_the_ladder_within_budget_and_better_than_the_smallest(curves, rest):
    budget = sum(map(min, curves.values())) + rest
    result = allocate_masks(curves, budget)
    assert result.cost == sum(result.ks.values()) <= budget
    for row in result.modules:
        curve = curves[row.module_name]
        assert row.k in curve
        assert row.sensitivity == curve[row.k] >= curve[min(curve)]
        assert row.why
    backwards = dict(reversed(curves.items()))
    assert allocate_masks(backwards, budget).ks == result.ks
    scaled = {name: {k: 3e-9 * s for k, s in curve.items()} for name, curve in curves.items()}
    assert sum(allocate_masks(scaled, 10**6).ks.values()) == sum(allocate_masks(curves, 10**6).ks.values())


@pytest.mark.slow
@given(curves=CURVES, steps=st.integers(0, 12))
@settings(deadline=None)
def test_at_the_budgets_where_a_step_ends_no_other_ks_have_a_larger_sum(curves, steps):
    segments = [
        ((low - high) / (b - a), name, b - a)
        for name, curve in curves.items()
        for (a, low), (b, high) in itertools.pairwise(envelope(curve))
    ]
    budget = sum(map(min, curves.values())) + sum(cost for _, _, cost in sorted(segments)[:steps])
    result = allocate_masks(curves, budget)
    assert result.cost == budget
    best = max(
        sum(curves[name][k] for name, k in zip(curves, ks, strict=True))
        for ks in itertools.product(*curves.values())
        if sum(ks) <= budget
    )
    assert sum(row.sensitivity for row in result.modules) == pytest.approx(best)


def test_a_step_that_does_not_fit_leaves_the_best_k_below_its_end():
    result = allocate_masks({"a": {1: 0.0, 5: 1.0, 10: 9.0}, "b": {1: 0.0}}, 8)
    assert result.ks == {"a": 5, "b": 1}
    assert [row.why for row in result.modules] == [
        "the next step, to k = 10, costs 9 with 6 left",
        "the largest k of the ladder",
    ]
    falling = allocate_masks({"a": {1: 3.0, 2: 1.0}}, 5)
    assert (falling.ks, falling.modules[0].why) == ({"a": 1}, "a larger k gains nothing")


def test_it_reports():
    curves = {f"layers.{i}.q_proj": {1: 0.0, 25: float(i)} for i in range(3)}
    result = allocate_masks(curves, 51, roles=dict.fromkeys(curves, "query"), limits=dict.fromkeys(curves, 64))
    assert result.headline == "3 modules, k 1–25, 51 of 51 spent"
    assert result.details == ("query: k 1–25 in 3 modules",)
    text = result.explain()
    assert text.splitlines()[0] == "query: k 1–25 in 3 modules"
    assert "layers.2.q_proj" in text
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["modules"][2]["k"] == 25
    assert result.next_steps == (
        "lorakit.SpecLoRAConfig(k=25, target_modules=['q_proj'], k_pattern={'^layers.0.q_proj': 1})",
    )
    assert result.plot().axes
    assert sorted(result.shuffled(seed=1).values()) == [1, 25, 25]


@pytest.mark.parametrize(
    ("curves", "budget", "message"),
    [
        ({"a": {1: 1.0}, "b": {4: 1.0}}, 4, r"`budget` must cover the smallest k of all 2 modules \(at least 5\)"),
        ({"a": {}}, 4, "`curves` must have S"),
        ({"a": {0: 1.0}}, 4, "`curves` must have S"),
        ({"a": {1: float("nan")}}, 4, "`curves` must have S"),
        ({"a": {1: -1.0}}, 4, "`curves` must have S"),
        ({"a": {1: 1.0}}, 4.0, "`budget` must be an integer"),
    ],
)
def test_what_cannot_be_allocated_is_refused(curves, budget, message):
    with pytest.raises(AllocationError, match=message):
        allocate_masks(curves, budget)


@pytest.mark.slow
@given(
    values=st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_shuffled_values_keep_their_sum_and_every_limit(values, seed):
    ks = {name: k for name, (k, _) in values.items()}
    limits = {name: k + more for name, (k, more) in values.items()}
    moved = shuffled(ks, limits=limits, seed=seed)
    assert list(moved) == list(ks)
    assert sorted(moved.values()) == sorted(ks.values())
    assert all(k <= limits[name] for name, k in moved.items())
    costs = {name: more for name, (_, more) in values.items()}
    ranks = shuffled(ks, costs=costs, seed=seed)
    assert sum(ranks[n] * costs[n] for n in ks) == sum(ks[n] * costs[n] for n in ks)


def test_every_permutation_within_the_limits_is_as_likely():
    values, limits = {"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 3, "c": 3}
    draws = [tuple(shuffled(values, limits=limits, seed=seed).values()) for seed in range(3000)]
    assert set(draws) == {(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1)}
    assert all(650 < draws.count(draw) < 850 for draw in set(draws))


def test_a_shuffle_refuses_what_does_not_fit():
    with pytest.raises(AllocationError, match="`values` and `limits` must have the same modules"):
        shuffled({"a": 1}, limits={"b": 1}, seed=0)
    with pytest.raises(AllocationError, match=r"must not exceed `limits`; they do for \['a'\]"):
        shuffled({"a": 2}, limits={"a": 1}, seed=0)
