"""One reference and one candidate, scored on the same documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lorakit.errors import EvaluationError
from lorakit.statistics import _tango
from lorakit.statistics._inputs import Floats, as_alpha, as_groups, as_pair, differences, is_binary
from lorakit.statistics._interval import Alternative, Interval, mean_and_error, t_bounds
from lorakit.statistics._verdict import z_quantile


@dataclass(frozen=True, kw_only=True)
class PairedInterval(Interval):
    """The difference of two models on the same documents.

    `method` is "tango", "t" or "cluster-t". For binary scores, `candidate_only` and `reference_only` count the
    documents that one side alone gets right, and `mcnemar_p_value` is McNemar's exact two-sided p-value; they are None
    for other scores.
    `standard_error` is Wald's for "tango", whose bounds do not come from it. `num_groups` is None without groups.
    """

    num_groups: int | None
    candidate_only: int | None
    reference_only: int | None
    mcnemar_p_value: float | None

    def _is_binary(self) -> bool:
        return self.candidate_only is not None

    def _p_value(self, threshold: float, alternative: Alternative) -> float:
        p_values = []
        if self.degrees_of_freedom is not None:
            p_values.append(super()._p_value(threshold, alternative))
        if self.candidate_only is not None and self.reference_only is not None:
            b, c = self.candidate_only, self.reference_only
            if alternative == "less":
                b, c, threshold = c, b, -threshold
            p_values.append(_tango.p_value_greater(b, c, self.n, threshold))
        return max(p_values)


def paired_interval(
    reference_scores: Any, candidate_scores: Any, *, alpha: float = 0.05, groups: Any = None
) -> PairedInterval:
    """Difference candidate − reference in mean score, with one-sided bounds, each at level `alpha`.

    Tango's score bounds where every score is exactly 0 or 1; they are honest with few or no discordant pairs, when they
    are wider than a t interval. Else t bounds with n − 1 degrees of freedom. With `groups` (documents that share a
    passage, say) cluster t bounds with G − 1 degrees of freedom, for binary scores never narrower than Tango's.

    Tango's bounds are approximate. At alpha 0.05 the bound that decides a PASS, `lower` for a true loss, covers at
    least 94 % (for losses up to 5 points from 50 documents on, for all from 100 on). `upper`, which decides a FAIL,
    covers less where few discordant pairs are expected and most go one way: 90.5 % at worst, with 5 pairs; 93 % or more
    with 20. For a true gain the two change places.

    Args:
        reference_scores, candidate_scores: (n,), one score a document in the same order, higher is better; anything
            that numpy can make an array of real numbers or booleans.
        alpha: in (0, 0.5]; 0.05 makes `lower` and `upper` together a 90 % interval.
        groups: (n,), the label of each document's group, or None.

    Raises: EvaluationError for scores that are empty, of different lengths, not one-dimensional, not finite or not
    numbers; for a single document with scores that are not binary; for alpha outside (0, 0.5]; for groups of another
    length, or fewer than two.
    References: Tango, Statistics in Medicine 17, 1998; McNemar, Psychometrika 12, 1947; Cameron and Miller, "A
    practitioner's guide to cluster-robust inference", 2015.

    Example:
        >>> reference = [1] * 17 + [0] * 8
        >>> candidate = [1] * 15 + [0] * 9 + [1]
        >>> interval = paired_interval(reference, candidate)
        >>> round(interval.difference, 3), round(interval.lower, 3), round(interval.upper, 3)
        (-0.04, -0.184, 0.097)
        >>> interval.verdict(margin=0.02)
        'INCONCLUSIVE'
    """
    alpha = as_alpha(alpha)
    reference, candidate = as_pair(reference_scores, candidate_scores)
    codes = None if groups is None else as_groups(groups, reference.size)
    if is_binary(reference, candidate):
        return _binary(reference, candidate, alpha, codes)
    d = differences(reference, candidate)
    if d.size < 2:
        raise EvaluationError("`reference_scores` must have at least 2 documents, unless all scores are 0 or 1; got 1.")
    return _continuous(d, alpha, codes)


def _continuous(d: Floats, alpha: float, groups: NDArray[np.intp] | None) -> PairedInterval:
    difference, error, degrees = mean_and_error(d, groups)
    lower, upper = t_bounds(difference, error, degrees, alpha)
    return PairedInterval(
        difference=difference,
        lower=lower,
        upper=upper,
        alpha=alpha,
        n=d.size,
        method="t" if groups is None else "cluster-t",
        standard_error=error,
        degrees_of_freedom=degrees,
        num_groups=None if groups is None else degrees + 1,
        candidate_only=None,
        reference_only=None,
        mcnemar_p_value=None,
    )


def _binary(reference: Floats, candidate: Floats, alpha: float, groups: NDArray[np.intp] | None) -> PairedInterval:
    b, c = discordant(reference, candidate)
    n = reference.size
    difference = (b - c) / n
    lower, upper = tango_bounds(b, c, n, alpha)
    error = math.sqrt(max((b + c) / n - difference**2, 0) / n)
    degrees = None
    if groups is not None:
        _, error, degrees = mean_and_error(candidate - reference, groups)
        clustered = t_bounds(difference, error, degrees, alpha)
        lower, upper = min(lower, clustered[0]), max(upper, clustered[1])
    return PairedInterval(
        difference=difference,
        lower=lower,
        upper=upper,
        alpha=alpha,
        n=n,
        method="tango" if groups is None else "cluster-t",
        standard_error=error,
        degrees_of_freedom=degrees,
        num_groups=None if degrees is None else degrees + 1,
        candidate_only=b,
        reference_only=c,
        mcnemar_p_value=float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0,
    )


def discordant(reference: Floats, candidate: Floats) -> tuple[int, int]:
    """How many documents the candidate alone gets right, and the reference alone."""
    return int((candidate > reference).sum()), int((reference > candidate).sum())


def tango_bounds(candidate_only: int, reference_only: int, n: int, alpha: float) -> tuple[float, float]:
    """Tango's lower and upper bound, each at level alpha."""
    z = z_quantile(alpha)
    return (
        _tango.lower_bound(candidate_only, reference_only, n, z),
        -_tango.lower_bound(reference_only, candidate_only, n, z),
    )
