"""Paired intervals, over documents, groups, corpus metrics and seeds."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import pkgutil
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.weightstats import DescrStatsW

import lorakit.statistics
from lorakit.errors import EvaluationError
from lorakit.statistics import jackknife_interval, paired_interval, seeds_interval
from lorakit.statistics._paired import tango_bounds

RNG = np.random.default_rng(3)
BINARY = RNG.integers(0, 2, (2, 60))
CONTINUOUS = RNG.normal(0, 1, (2, 60))
GROUPS = np.repeat(np.arange(12), 5)


def scores(reference_only, candidate_only, n):
    """Binary scores with these discordant counts; the rest both right."""
    reference, candidate = np.ones(n), np.ones(n)
    candidate[:reference_only] = 0
    reference[n - candidate_only :] = 0
    return reference, candidate


@pytest.mark.parametrize("module", ["", *(info.name for info in pkgutil.iter_modules(lorakit.statistics.__path__))])
def test_examples_in_docstrings(module):
    name = "lorakit.statistics" + (f".{module}" if module else "")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", lorakit.statistics.__all__)
def test_every_public_name_is_documented_and_functions_have_an_example(name):
    value = getattr(lorakit.statistics, name)
    if name != "Verdict":
        assert value.__doc__
        assert isinstance(value, type) or ">>>" in value.__doc__


# --- One pair of models, binary scores


def test_binary_scores_get_tangos_bounds_and_mcnemars_test():
    interval = paired_interval(*scores(12, 5, 500))
    assert interval.method == "tango"
    assert (interval.n, interval.candidate_only, interval.reference_only) == (500, 5, 12)
    assert interval.difference == -7 / 500
    assert (interval.lower, interval.upper) == tango_bounds(5, 12, 500, 0.05)
    assert interval.mcnemar_p_value == pytest.approx(mcnemar([[400, 12], [5, 83]], exact=True).pvalue)
    assert interval.standard_error == pytest.approx(np.std([1] * 5 + [-1] * 12 + [0] * 483) / math.sqrt(500))
    assert interval.degrees_of_freedom is None
    assert interval.num_groups is None


def test_reference_against_itself_is_exactly_0_and_passes_given_enough_documents():
    few, enough = (paired_interval([1, 0, 0] * n, [1, 0, 0] * n) for n in (50, 100))
    assert few.difference == enough.difference == 0
    assert few.mcnemar_p_value == 1
    assert (few.verdict(0.01), enough.verdict(0.01)) == ("INCONCLUSIVE", "PASS")
    continuous = paired_interval([0.1, -3.7, 1e9], [0.1, -3.7, 1e9])
    assert (continuous.lower, continuous.difference, continuous.upper) == (0, 0, 0)


@pytest.mark.parametrize(
    "convert",
    [list, tuple, lambda x: x.astype(bool), lambda x: x.astype(np.uint8), torch.tensor, lambda x: x.astype(np.float16)],
)
def test_anything_array_like_gives_the_same_interval(convert):
    assert paired_interval(convert(BINARY[0]), convert(BINARY[1])) == paired_interval(*BINARY)


def test_unsigned_scores_do_not_wrap_around():
    assert paired_interval(np.array([3, 5], np.uint8), np.array([1, 4], np.uint8)).difference == -1.5


def test_one_binary_document_is_enough_and_says_little():
    interval = paired_interval([1], [1])
    assert interval.method == "tango"
    assert -0.75 < interval.lower < -0.7


# --- One pair of models, continuous scores


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
def test_continuous_scores_get_t_bounds(alpha):
    interval = paired_interval(*CONTINUOUS, alpha=alpha)
    d = CONTINUOUS[1] - CONTINUOUS[0]
    description = DescrStatsW(d)
    assert interval.method == "t"
    assert interval.degrees_of_freedom == 59
    assert interval.standard_error == pytest.approx(stats.sem(d))
    assert (interval.lower, interval.upper) == pytest.approx(description.tconfint_mean(alpha=2 * alpha))
    assert interval.candidate_only is interval.reference_only is interval.mcnemar_p_value is None
    for alternative, theirs in [("greater", "larger"), ("less", "smaller")]:
        expected = description.ttest_mean(-0.1, alternative=theirs)[1]
        assert interval.p_value(-0.1, alternative=alternative) == pytest.approx(expected)


def test_one_score_that_is_not_binary_takes_the_t_bounds():
    assert paired_interval([0, 1, 1], [1, 1, 0.5]).method == "t"
    assert paired_interval([0, 1, 1], [1, 1, 1.0 + 2**-52]).method == "t"


FINITE = st.floats(-1e6, 1e6)
PAIRS = st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=30).map(lambda pairs: np.array(pairs).T)


@pytest.mark.slow
@settings(deadline=None)
@given(PAIRS, st.integers(-40, 40))
def test_t_bounds_scale_with_the_scores(pair, exponent):
    factor = 2.0**exponent
    plain = paired_interval(*pair) if not np.isin(pair, (0, 1)).all() else None
    scaled = paired_interval(*(pair * factor))
    if plain and scaled.method == "t":
        assert (scaled.lower, scaled.difference, scaled.upper) == pytest.approx(
            (plain.lower * factor, plain.difference * factor, plain.upper * factor), rel=1e-12
        )


@pytest.mark.slow
@settings(deadline=None)
@given(PAIRS, st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_bounds_contain_the_difference_shrink_with_alpha_and_swap_with_the_sides(pair, first, second):
    wide, narrow = (paired_interval(*pair, alpha=alpha) for alpha in sorted([first, second]))
    assert wide.lower <= narrow.lower <= narrow.difference <= narrow.upper <= wide.upper
    swapped = paired_interval(pair[1], pair[0], alpha=wide.alpha)
    assert (-swapped.upper, -swapped.difference, -swapped.lower) == (wide.lower, wide.difference, wide.upper)


@pytest.mark.parametrize("factor", [1e-200, 1e200, 1e300])
def test_extreme_scores_neither_overflow_nor_vanish(factor):
    interval = paired_interval(CONTINUOUS[0] * factor, CONTINUOUS[1] * factor)
    expected = paired_interval(*CONTINUOUS)
    assert interval.lower / factor == pytest.approx(expected.lower)
    assert interval.standard_error / factor == pytest.approx(expected.standard_error)


def test_a_constant_difference_has_no_spread():
    interval = paired_interval([0.0] * 7, [0.1] * 7)  # seven times 0.1 is not 0.7
    assert interval.lower == interval.difference == interval.upper == 0.1
    assert interval.p_value(0.09) == 0
    assert interval.p_value(0.1) == interval.p_value(0.1, alternative="less") == 1


# --- Groups


@pytest.mark.parametrize("groups", [GROUPS, RNG.integers(0, 9, 60)])
def test_groups_give_cluster_robust_bounds(groups):
    interval = paired_interval(*CONTINUOUS, groups=groups)
    fit = OLS(CONTINUOUS[1] - CONTINUOUS[0], np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "df_correction": True}, use_t=True
    )
    assert interval.method == "cluster-t"
    assert interval.num_groups == len(set(groups.tolist())) == interval.degrees_of_freedom + 1
    assert interval.standard_error == pytest.approx(fit.bse[0])
    assert (interval.lower, interval.upper) == pytest.approx(tuple(fit.conf_int(0.1)[0]))


@pytest.mark.parametrize(
    "labels", [list(map(str, GROUPS)), [(g, 0) for g in GROUPS], torch.tensor(GROUPS), 11 - GROUPS]
)
def test_labels_of_groups_may_be_anything_hashable(labels):
    assert paired_interval(*CONTINUOUS, groups=labels) == paired_interval(*CONTINUOUS, groups=GROUPS)


def test_a_group_a_document_is_no_grouping():
    alone, plain = paired_interval(*CONTINUOUS, groups=range(60)), paired_interval(*CONTINUOUS)
    assert (alone.lower, alone.upper) == pytest.approx((plain.lower, plain.upper))


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=2, max_size=40).filter(
        lambda rows: len({row[2] for row in rows}) > 1
    ),
    st.floats(0.005, 0.3),
    st.floats(-1, 1),
)
@example(rows=[(False, False, 0), (False, False, 1)], alpha=0.25, threshold=5e-324)
def test_groups_of_binary_scores_are_never_narrower_than_tango(rows, alpha, threshold):
    reference, candidate, groups = zip(*rows, strict=True)
    grouped = paired_interval(reference, candidate, groups=groups, alpha=alpha)
    plain = paired_interval(reference, candidate, alpha=alpha)
    assert (grouped.method, plain.method) == ("cluster-t", "tango")
    assert grouped.lower <= plain.lower <= plain.upper <= grouped.upper
    for alternative, clears in [("greater", grouped.lower > threshold), ("less", grouped.upper < threshold)]:
        if min(abs(grouped.lower - threshold), abs(grouped.upper - threshold)) > 1e-9:
            assert (grouped.p_value(threshold, alternative=alternative) < alpha) == clears


def test_groups_that_stick_together_widen_binary_bounds():
    reference, candidate = np.tile([1, 0], 50), np.tile([1, 0], 50)
    candidate[:10] = 0
    candidate[-9:] = 1
    grouped = paired_interval(reference, candidate, groups=np.repeat(range(10), 10))
    assert grouped.lower < paired_interval(reference, candidate).lower - 0.01


# --- Input that is refused

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("reference", "candidate", "options", "message"),
    [
        ([], [], {}, r"`reference_scores` must be one number a document .* got shape \(0,\)"),
        ([1, 0], [1], {}, r"same documents in the same order; got shapes \(2,\) and \(1,\)"),
        ([0.5], [0.25], {}, "at least 2 documents, unless all scores are 0 or 1; got 1"),
        ([1, NAN], [1, 0], {}, "`reference_scores` must be finite; got nan for document 1"),
        ([1, 0], [-INF, 0], {}, "`candidate_scores` must be finite; got -inf for document 0"),
        ([[1, 0]], [[1, 0]], {}, r"got shape \(1, 2\)"),
        (1.0, 0.0, {}, r"got shape \(\) from float"),
        ({"a": 1}, {"a": 1}, {}, r"got shape \(\) from dict"),
        (["1", "0"], ["1", "0"], {}, "real numbers or booleans; got dtype <U1"),
        ([1, None], [1, 0], {}, "got dtype object"),
        ([1 + 1j, 0], [1, 0], {}, "got dtype complex128"),
        ([[1], [1, 2]], [1, 0], {}, "cannot be made a numpy array"),
        ([1.5e308, 0], [-1.5e308, 0], {}, "it overflows"),
        ([1, 0], [1, 0], {"alpha": 0}, r"`alpha` must be in \(0, 0.5\].*got 0\. 0.05 is customary"),
        ([1, 0], [1, 0], {"alpha": 0.51}, "`alpha` must be in"),
        ([1, 0], [1, 0], {"alpha": NAN}, "`alpha` must be a number; got nan"),
        ([1, 0], [1, 0], {"alpha": "0.05"}, "`alpha` must be a number; got '0.05'"),
        ([1, 0], [1, 0], {"alpha": True}, "`alpha` must be a number; got True"),
        ([1, 0], [1, 0], {"groups": [1]}, r"`groups` must have one label a document \(2\); got 1"),
        ([1, 0], [1, 0], {"groups": 7}, r"`groups` must have one label a document \(2\); got 1"),
        ([1, 0], [1, 0], {"groups": np.array(7)}, "got a single label"),
        ([1, 0], [1, 0], {"groups": ["p", "p"]}, "`groups` must name at least 2 groups; all 2 documents are in 'p'"),
        ([1, 0], [1, 0], {"groups": [NAN, 1]}, "got NaN"),
        ([1, 0], [1, 0], {"groups": [[1], [2]]}, "hashable labels"),
    ],
)
def test_scores_from_which_there_is_no_interval_are_refused(reference, candidate, options, message):
    with pytest.raises(EvaluationError, match=message):
        paired_interval(reference, candidate, **options)


def test_p_values_need_a_threshold_and_a_side():
    interval = paired_interval([1, 0], [1, 0])
    with pytest.raises(EvaluationError, match='`alternative` must be "greater" or "less"; got \'two-sided\''):
        interval.p_value(0.0, alternative="two-sided")
    with pytest.raises(EvaluationError, match="`threshold` must be a number; got nan"):
        interval.p_value(NAN)


# --- Reports


@pytest.mark.parametrize(
    "interval",
    [
        paired_interval(*BINARY),
        paired_interval(*BINARY, groups=GROUPS),
        paired_interval(*CONTINUOUS),
        jackknife_interval(lambda y, p: float((y == p).mean()), BINARY[0], BINARY[1], BINARY[0]),
        seeds_interval(RNG.integers(0, 2, (3, 20)), RNG.integers(0, 2, (3, 20))),
    ],
    ids=lambda interval: interval.method,
)
def test_intervals_are_frozen_and_become_json(interval):
    fields = interval.to_dict()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["difference"] == interval.difference
    with pytest.raises(FrozenInstanceError):
        interval.lower = 0


# --- Corpus metrics


def accuracy(labels, predictions):
    return float((labels == predictions).mean())


def matthews(labels, predictions):
    table = np.array([[((labels == i) & (predictions == j)).sum() for j in (0, 1)] for i in (0, 1)], dtype=float)
    product = table.sum(0).prod() * table.sum(1).prod()
    return float((table[1, 1] * table[0, 0] - table[0, 1] * table[1, 0]) / math.sqrt(product)) if product else 0.0


LABELS = RNG.integers(0, 2, 60)
FIRST, SECOND = (np.where(RNG.random(60) < noise, 1 - LABELS, LABELS) for noise in (0.1, 0.25))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_jackknife_of_a_mean_is_the_t_interval(groups):
    interval = jackknife_interval(accuracy, LABELS, FIRST, SECOND, groups=groups)
    shifted = (2.0 * (FIRST == LABELS), 2.0 * (SECOND == LABELS))  # doubled, so that they are not binary
    expected = paired_interval(*shifted, groups=groups)
    assert interval.method == ("jackknife-t" if groups is None else "cluster-jackknife-t")
    assert (interval.difference, interval.lower, interval.upper, interval.standard_error) == pytest.approx(
        (expected.difference / 2, expected.lower / 2, expected.upper / 2, expected.standard_error / 2)
    )
    assert interval.num_groups == expected.num_groups


def test_jackknife_of_matthews_from_pseudo_values_written_out():
    interval = jackknife_interval(matthews, LABELS, FIRST, SECOND, alpha=0.1)

    def pseudo_values(predictions):
        whole = np.corrcoef(LABELS, predictions)[0, 1]
        rest = [np.corrcoef(np.delete(LABELS, j), np.delete(predictions, j))[0, 1] for j in range(60)]
        return 60 * whole - 59 * np.array(rest)

    d = pseudo_values(SECOND) - pseudo_values(FIRST)
    assert interval.reference_metric == pytest.approx(np.corrcoef(LABELS, FIRST)[0, 1])
    assert interval.candidate_metric == pytest.approx(np.corrcoef(LABELS, SECOND)[0, 1])
    assert interval.difference == pytest.approx(d.mean())
    expected = stats.t.interval(0.8, 59, loc=d.mean(), scale=stats.sem(d))
    assert (interval.lower, interval.upper) == pytest.approx(expected)


def test_jackknife_of_the_reference_against_itself_is_exactly_0():
    interval = jackknife_interval(matthews, LABELS, SECOND, SECOND)
    assert (interval.lower, interval.difference, interval.upper) == (0, 0, 0)


def test_jackknife_takes_strings_and_rows():
    text = jackknife_interval(accuracy, list("abcd"), list("abca"), list("bbca"))
    assert text.candidate_metric - text.reference_metric == -0.25
    rows = RNG.normal(0, 1, (3, 5, 2))
    jackknife_interval(lambda y, p: -float(((y - p) ** 2).mean()), *rows)


@pytest.mark.parametrize(
    ("metric", "arrays", "message"),
    [
        (accuracy, ([0, 1], [0, 1], [0]), "same documents, at least 2; got 2, 2 and 1"),
        (accuracy, ([0], [0], [0]), "at least 2; got 1, 1 and 1"),
        (accuracy, (3, [0, 1], [0, 1]), "`labels` must be an array with a row a document; got int"),
        (accuracy, ([0, 1], [[0], [0, 1]], [0, 1]), "`reference_predictions` must be an array with a row a document"),
        (lambda y, p: NAN, ([0, 1], [0, 1], [0, 1]), "must be finite; got nan for the reference on all documents"),
        (lambda y, p: "good", ([0, 1], [0, 1], [0, 1]), "`metric` must return a number; got str"),
        (
            lambda y, p: INF if len(y) == 2 and y[0] == 0 and p[0] == 9 else 0.0,
            ([0, 0, 1], [0, 1, 1], [9, 1, 0]),
            "got inf for the candidate with document 1 left out",
        ),
    ],
)
def test_jackknife_refuses_what_gives_no_interval(metric, arrays, message):
    with pytest.raises(EvaluationError, match=message):
        jackknife_interval(metric, *arrays)


# --- Several seeds


@pytest.mark.parametrize("groups", [None, np.arange(40) // 4])
def test_seeds_interval_is_the_formula(groups):
    rng = np.random.default_rng(5)
    reference = rng.normal(0, 1, (4, 40))
    d = rng.normal(0.1, 0.3, (4, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (4, 40))
    interval = seeds_interval(reference, reference + d, groups=groups)
    seeds = stats.sem(d.mean(1))
    documents = paired_interval(np.zeros(40), d.mean(0), groups=groups)
    error = math.sqrt(seeds**2 + documents.standard_error**2)
    degrees = error**4 / (seeds**4 / 3 + documents.standard_error**4 / documents.degrees_of_freedom)
    assert interval.method == ("seeds-t" if groups is None else "seeds-cluster-t")
    assert interval.difference == pytest.approx(d.mean())
    assert (interval.standard_error_seeds, interval.standard_error_documents) == pytest.approx(
        (seeds, documents.standard_error)
    )
    assert interval.degrees_of_freedom == pytest.approx(degrees)
    assert interval.lower == pytest.approx(d.mean() - stats.t.ppf(0.95, degrees) * error)
    assert interval.upper == pytest.approx(d.mean() + stats.t.ppf(0.95, degrees) * error)
    assert interval.seed_differences == pytest.approx(tuple(d.mean(1)))
    assert interval.worst_seed_difference == pytest.approx(d.mean(1).min())
    assert interval.to_dict()["worst_seed_difference"] == interval.worst_seed_difference
    assert not interval.binary


def test_binary_seeds_have_at_least_tangos_error_over_documents():
    same = np.tile([1, 0], (3, 50))
    interval = seeds_interval(same, same)
    z = stats.norm.isf(0.05)
    assert interval.difference == interval.standard_error_seeds == 0
    assert interval.standard_error_documents == pytest.approx(z / (100 + z * z))
    assert interval.lower == pytest.approx(-stats.t.ppf(0.95, 99) * z / (100 + z * z))

    candidate = same.copy()
    for seed, wrong in enumerate([3, 5, 9]):
        candidate[seed, : 2 * wrong : 2] = 0
    floor = np.mean([-wrong / 100 - tango_bounds(0, wrong, 100, 0.05)[0] for wrong in [3, 5, 9]]) / z
    unfloored = stats.sem((candidate - same).mean(0))
    found = seeds_interval(same, candidate).standard_error_documents
    assert found == pytest.approx(max(floor, unfloored))
    assert floor > unfloored
    assert seeds_interval(2.0 * same, 2.0 * candidate).standard_error_documents == pytest.approx(2 * unfloored)


def test_seeds_without_any_spread_and_at_alpha_one_half():
    scores = RNG.normal(0, 1, (3, 10))
    interval = seeds_interval(scores, scores)
    assert (interval.lower, interval.upper, interval.standard_error) == (0, 0, 0)
    binary = seeds_interval(np.ones((3, 10)), np.eye(3, 10), alpha=0.5)
    assert binary.lower == binary.difference == binary.upper


def test_gradiences_policy_looks_at_the_worst_seed_alone():
    reference = np.zeros((3, 40))
    candidate = np.full((3, 40), 0.5)
    candidate[1] = -0.03
    interval = seeds_interval(reference, candidate)
    assert not interval.within_policy()
    assert interval.within_policy(0.04)
    with pytest.raises(EvaluationError, match="`tolerance` must be positive"):
        interval.within_policy(-0.025)


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (np.zeros((2, 5)), np.zeros((2, 5)), r"at least 3 seeds and 2 documents; got shape \(2, 5\)"),
        (np.zeros((3, 1)), np.zeros((3, 1)), r"got shape \(3, 1\)"),
        (np.zeros((3, 5)), np.zeros((4, 5)), r"and as many seeds; got shapes \(3, 5\) and \(4, 5\)"),
        (np.zeros(5), np.zeros(5), r"must be seeds × documents \(S, n\)"),
        ([[0, 1]] * 2 + [[0, NAN]], np.zeros((3, 2)), "got nan for seed 2, document 1"),
        ([[0, 1], [0], [1, 1]], np.zeros((3, 2)), "cannot be made a numpy array"),
    ],
)
def test_seeds_that_give_no_interval_are_refused(reference, candidate, message):
    with pytest.raises(EvaluationError, match=message):
        seeds_interval(reference, candidate)
