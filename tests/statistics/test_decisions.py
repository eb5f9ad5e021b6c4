"""Verdicts, numbers of documents, several tasks and candidates, ladders, and controls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lorakit.errors import EvaluationError
from lorakit.statistics import (
    combine_tasks,
    compare_candidates,
    control_p_value,
    documents_needed,
    fixed_sequence,
    holm,
    paired_interval,
    seeds_interval,
    verdict,
)

Z = stats.norm.isf(0.05)
POWER = stats.norm.ppf(0.8)


def interval(lost, gained=0, n=400, alpha=0.05):
    """Of a candidate that loses and gains this many documents out of n."""
    reference, candidate = np.ones(n), np.ones(n)
    candidate[:lost] = 0
    reference[n - gained :] = 0
    return paired_interval(reference, candidate, alpha=alpha)


# --- One verdict


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (-0.01, 0.01, "PASS"),
        (0.03, 0.05, "PASS"),
        (-0.02, 0.01, "INCONCLUSIVE"),  # lower at −margin is no PASS
        (-0.05, -0.02, "INCONCLUSIVE"),  # upper at −margin is no FAIL
        (-0.05, 0.05, "INCONCLUSIVE"),
        (-0.05, -0.021, "FAIL"),
        (-math.inf, math.inf, "INCONCLUSIVE"),
    ],
)
def test_verdict(lower, upper, expected):
    assert verdict(lower, upper, 0.02) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0), "`margin` must be positive and finite, the largest loss that is still acceptable.*; got 0"),
        ((0, 0, -0.01), "`margin` must be positive"),
        ((0, 0, math.inf), "`margin` must be positive"),
        ((0, 0, "1%"), "`margin` must be a number; got '1%'"),
        ((math.nan, 0, 0.1), "`lower` must be a number; got nan"),
        ((0, None, 0.1), "`upper` must be a number; got None"),
        ((0.2, 0.1, 0.1), "`lower` must not exceed `upper`; got 0.2 and 0.1"),
    ],
)
def test_verdicts_that_cannot_be_had(arguments, message):
    with pytest.raises(EvaluationError, match=message):
        verdict(*arguments)


# --- Numbers of documents


@settings(deadline=None)
@given(st.floats(0, 10), st.floats(0.001, 1), st.floats(0.001, 0.5), st.floats(0.5, 0.99))
def test_documents_needed_is_the_formula(s, margin, alpha, power):
    expected = ((stats.norm.isf(alpha) + stats.norm.ppf(power)) * s / margin) ** 2
    found = documents_needed(s, margin, alpha=alpha, power=power)
    assert found == pytest.approx(max(1, math.ceil(expected)), abs=1 + 1e-9 * expected)
    assert found >= expected * (1 - 1e-9)


def test_documents_needed_of_intervals():
    continuous = paired_interval(np.zeros(50), np.tile([0.3, -0.3, 0.1, 0.2, -0.1], 10))
    s = np.std(np.tile([0.3, -0.3, 0.1, 0.2, -0.1], 10), ddof=1)
    assert continuous.documents_needed(0.02) == math.ceil(((Z + POWER) * s / 0.02) ** 2)
    discordant = interval(12, 5, n=500)
    s2 = 17 / 500 - (7 / 500) ** 2
    assert discordant.documents_needed(0.02) == math.ceil(((Z + POWER) / 0.02) ** 2 * s2)


def test_binary_scores_without_a_discordant_pair_still_need_documents():
    floor = Z**2 / (50 + Z**2)
    expected = math.ceil(((Z + POWER) / 0.01) ** 2 * floor)
    assert interval(0, n=50).documents_needed(0.01) == expected
    assert documents_needed(0.0, 0.01, binary_documents=50) == expected
    assert documents_needed(0.0, 0.01) == 1


def test_groups_that_stick_together_need_more_documents():
    d = np.repeat(np.random.default_rng(0).normal(0, 1, 20), 10)
    grouped = paired_interval(np.zeros(200), d, groups=np.repeat(range(20), 10))
    assert grouped.documents_needed(0.1) > 8 * paired_interval(np.zeros(200), d).documents_needed(0.1)


def test_documents_cannot_make_up_for_seeds():
    rng = np.random.default_rng(1)
    d = np.array([[0.03], [0.0], [-0.03]]) + rng.normal(0, 0.1, (1, 400))
    found = seeds_interval(np.zeros((3, 400)), d)
    assert found.documents_needed(0.02) is None
    n = found.documents_needed(0.06)
    error = math.sqrt(found.standard_error_seeds**2 + found.standard_error_documents**2 * 400 / n)
    assert (Z + POWER) * error == pytest.approx(0.06, rel=0.01)
    same = seeds_interval(np.ones((3, 50)), np.ones((3, 50)))
    assert same.documents_needed(0.01) == interval(0, n=50).documents_needed(0.01)


@pytest.mark.slow
def test_a_candidate_as_good_as_the_reference_passes_with_the_documents_needed():
    rng = np.random.default_rng(2)
    n = documents_needed(math.sqrt(0.04), 0.02)
    passes = 0
    for _ in range(300):
        b, c, _ = rng.multinomial(n, [0.02, 0.02, 0.96])
        passes += interval(c, b, n=n).verdict(0.02) == "PASS"
    assert passes / 300 == pytest.approx(0.8, abs=4 * (0.16 / 300) ** 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standard_deviation": -1}, "`standard_deviation` must be finite and not negative; got -1"),
        ({"standard_deviation": math.inf}, "`standard_deviation` must be finite"),
        ({"margin": 0}, "`margin` must be positive"),
        ({"margin": 1e-300}, "`margin` 1e-300 is too small beside"),
        ({"alpha": 0.6}, "`alpha` must be in"),
        ({"power": 1}, r"`power` must be in \[0.5, 1\); got 1"),
        ({"power": 0.2}, "`power` must be in"),
        ({"binary_documents": 0}, "`binary_documents` must be a positive integer; got 0"),
        ({"binary_documents": 2.5}, "`binary_documents` must be a positive integer; got 2.5"),
    ],
)
def test_numbers_of_documents_that_cannot_be_had(options, message):
    with pytest.raises(EvaluationError, match=message):
        documents_needed(**({"standard_deviation": 0.2, "margin": 0.01} | options))


def test_power_is_checked_for_seeds_too():
    with pytest.raises(EvaluationError, match="`power` must be in"):
        seeds_interval(np.ones((3, 5)), np.ones((3, 5))).documents_needed(0.01, power=2)


# --- Several tests at once


@pytest.mark.slow
@settings(max_examples=8, deadline=None)  # statsmodels collects garbage at every call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_holm(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_holm_rejects_step_by_step(p_values, alpha):
    rejected = set()
    for step, j in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[j] * (len(p_values) - step) >= alpha:
            break
        rejected.add(j)
    assert {j for j, p in enumerate(holm(p_values)) if p < alpha} == rejected


@pytest.mark.parametrize("p_values", [[1.2], [-0.1, 0.5], [math.nan], [], 0.3])
def test_holm_refuses_what_is_no_list_of_p_values(p_values):
    with pytest.raises(EvaluationError, match="`p_values` must be"):
        holm(p_values)


def test_all_tasks_must_pass():
    tasks = {"arc": interval(0), "piqa": interval(1), "boolq": interval(30, 30)}
    passing = combine_tasks({name: tasks[name] for name in ("arc", "piqa")}, 0.02)
    assert (passing.verdict, passing.headline) == ("PASS", "piqa")  # its lower bound is nearer −margin
    mixed = combine_tasks(tasks, 0.02)
    assert (mixed.verdict, mixed.headline) == ("INCONCLUSIVE", "boolq")
    assert mixed.verdicts == {"arc": "PASS", "piqa": "PASS", "boolq": "INCONCLUSIVE"}
    assert json.loads(json.dumps(mixed.to_dict()))["margins"] == {"arc": 0.02, "piqa": 0.02, "boolq": 0.02}


def test_a_task_that_fails_after_holm_fails_all():
    tasks = {"arc": interval(60), "piqa": interval(0), "boolq": interval(30, 30)}
    result = combine_tasks(tasks, 0.02)
    assert (result.verdict, result.headline) == ("FAIL", "arc")
    assert result.fail_p_values["arc"] == pytest.approx(3 * tasks["arc"].p_value(-0.02, alternative="less"))


def test_a_failure_that_holm_takes_back_is_inconclusive():
    barely = interval(13)
    assert barely.verdict(0.02) == "FAIL"
    assert 0.02 < barely.p_value(-0.02, alternative="less") < 0.05
    assert combine_tasks({"a": barely}, 0.02).verdict == "FAIL"
    result = combine_tasks({"a": barely, "b": interval(0), "c": interval(0)}, 0.02)
    assert (result.verdict, result.headline, result.verdicts["a"]) == ("INCONCLUSIVE", "a", "INCONCLUSIVE")


def test_each_task_has_its_margin_in_its_own_units():
    loss = paired_interval(np.zeros(100), np.tile([-0.4, -0.2], 50))
    tasks = {"loss": loss, "arc": interval(0)}
    # Clearance counts in margins: at 0.5 the loss has more left than arc in its own units, and less in margins.
    wide = combine_tasks(tasks, {"loss": 1.5, "arc": 0.02})
    assert (wide.verdict, wide.headline) == ("PASS", "arc")
    close = combine_tasks(tasks, {"loss": 0.5, "arc": 0.02})
    assert (close.verdict, close.headline) == ("PASS", "loss")
    assert loss.lower + 0.5 > tasks["arc"].lower + 0.02
    assert combine_tasks(tasks, {"loss": 0.1, "arc": 0.02}).verdict == "FAIL"


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.001, 0.2))
def test_one_task_alone_has_its_own_verdict(lost, gained, margin):
    alone = interval(lost, gained)
    result = combine_tasks({"arc": alone}, margin)
    if min(abs(alone.lower + margin), abs(alone.upper + margin)) > 1e-9:
        assert result.verdict == alone.verdict(margin)
        assert compare_candidates({"a": {"arc": alone}}, margin).verdicts["a"] == alone.verdict(margin)


@pytest.mark.parametrize(
    ("tasks", "margins", "message"),
    [
        ({}, 0.02, "`intervals` must be at least one, all at the same alpha; got none"),
        ({"a": interval(0), "b": interval(0, alpha=0.1)}, 0.02, r"same alpha; got \[0.05, 0.1\]"),
        ({"a": interval(0)}, {"b": 0.02}, r"`margins` must have each task's margin; got \['b'\] for the tasks \['a'\]"),
        ({"a": interval(0)}, {"a": 0}, r"`margins\['a'\]` must be positive"),
        ({"a": interval(0)}, -1, "`margins` must be positive"),
    ],
)
def test_tasks_that_do_not_fit_together_are_refused(tasks, margins, message):
    with pytest.raises(EvaluationError, match=message):
        combine_tasks(tasks, margins)


def test_candidates_side_by_side_are_adjusted():
    barely = interval(2)
    assert barely.verdict(0.02) == "PASS"
    p = barely.p_value(-0.02)
    assert 0.01 < p < 0.05
    others = {f"other {i}": {"arc": interval(8)} for i in range(4)}
    result = compare_candidates({"best": {"arc": barely}, **others}, 0.02)
    assert result.pass_p_values["best"] == pytest.approx(5 * p)
    assert result.verdicts["best"] == "INCONCLUSIVE"
    assert compare_candidates({"best": {"arc": barely}}, 0.02).verdicts == {"best": "PASS"}
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_candidate_passes_by_its_worst_task_and_fails_by_any():
    good, unclear, bad = interval(0), interval(30, 30), interval(60)
    result = compare_candidates(
        {"a": {"arc": good, "piqa": good}, "b": {"arc": good, "piqa": unclear}, "c": {"arc": good, "piqa": bad}},
        {"arc": 0.02, "piqa": 0.03},
    )
    assert result.verdicts == {"a": "PASS", "b": "INCONCLUSIVE", "c": "FAIL"}
    assert result.fail_p_values["c"] == pytest.approx(3 * 2 * bad.p_value(-0.03, alternative="less"))
    assert result.pass_p_values["a"] == pytest.approx(3 * good.p_value(-0.02))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "`candidates` must all have the same tasks; got no candidate"),
        ({"a": {"arc": interval(0)}, "b": {"piqa": interval(0)}}, r"got \[\['arc'\], \['piqa'\]\]"),
        ({"a": {}}, "`intervals` must be at least one"),
        ({"a": {"t": interval(0)}, "b": {"t": interval(0, alpha=0.1)}}, "all at the same alpha"),
    ],
)
def test_candidates_that_cannot_be_compared_are_refused(candidates, message):
    with pytest.raises(EvaluationError, match=message):
        compare_candidates(candidates, 0.02)


def family_wise_error(decide, draws, seed):
    rng = np.random.default_rng(seed)
    return np.mean([decide(rng) for _ in range(draws)])


@pytest.mark.slow
def test_candidates_that_are_all_just_too_bad_rarely_pass():
    # Every true difference is −margin; without Holm about 1 − 0.95⁵ = 23 % of the draws have a PASS.
    def any_pass(rng):
        candidates = {str(i): {"t": paired_interval(np.zeros(30), rng.normal(-0.5, 1, 30))} for i in range(5)}
        return "PASS" in compare_candidates(candidates, 0.5).verdicts.values()

    assert family_wise_error(any_pass, 1000, 7) < 0.05 + 4 * (0.0475 / 1000) ** 0.5


def test_a_ladder_of_candidates_that_are_all_just_too_bad_rarely_passes():
    def any_pass(rng):
        def test(_):
            return paired_interval(np.zeros(30), rng.normal(-0.5, 1, 30)).verdict(0.5)

        return fixed_sequence(range(5), test).last_passing is not None

    assert family_wise_error(any_pass, 2000, 8) == pytest.approx(0.05, abs=4 * (0.0475 / 2000) ** 0.5)


# --- Ladders


@pytest.mark.parametrize(("passing", "last", "tested"), [(3, 4, [16, 8, 4, 2]), (4, 2, [16, 8, 4, 2]), (0, None, [16])])
@pytest.mark.parametrize("stopped", ["FAIL", "INCONCLUSIVE"])
def test_a_ladder_stops_at_the_first_that_does_not_pass(passing, last, tested, stopped):
    ladder = [16, 8, 4, 2]
    called = []

    def test(rank):
        called.append(rank)
        return "PASS" if ladder.index(rank) < passing else stopped

    result = fixed_sequence(iter(ladder), test)
    assert called == tested == [rank for rank, _ in result.steps]
    assert result.last_passing == last


def test_ladders_that_cannot_be_tested_are_refused():
    with pytest.raises(EvaluationError, match="`candidates` must have at least one candidate; got none"):
        fixed_sequence([], lambda rank: "PASS")
    with pytest.raises(EvaluationError, match='`test` must return "PASS", "FAIL" or "INCONCLUSIVE"; got True'):
        fixed_sequence([4], lambda rank: True)


# --- Controls


@pytest.mark.parametrize(
    ("edit", "controls", "expected"),
    [(1.0, [0.0] * 19, 0.05), (1.0, [1.0] * 19, 1.0), (0.5, [0.1, 0.5, 0.9], 0.75), (0.0, [-1.0], 0.5)],
)
def test_control_p_value(edit, controls, expected):
    assert control_p_value(edit, controls) == expected


def test_an_edit_that_is_one_of_the_controls_is_significant_at_most_as_often_as_it_says():
    draws = np.random.default_rng(4).normal(0, 1, (4000, 20))
    p = np.array([control_p_value(row[0], row[1:]) for row in draws])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=4 * (0.0475 / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("edit", "controls", "message"),
    [
        (math.nan, [0.0], "`edit` must be a number; got nan"),
        (math.inf, [0.0], "`edit` must be finite"),
        (0.0, [], "`controls` must be one number a document"),
        (0.0, [math.nan], "`controls` must be finite"),
    ],
)
def test_controls_that_say_nothing_are_refused(edit, controls, message):
    with pytest.raises(EvaluationError, match=message):
        control_p_value(edit, controls)
