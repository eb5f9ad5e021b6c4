"""Verdicts at a margin, numbers of documents, and p-values against random controls."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from scipy import special

from lorakit.errors import EvaluationError
from lorakit.statistics._inputs import as_alpha, as_margin, as_number, as_power, as_scores

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


def z_quantile(alpha: float) -> float:
    """z_{1−α}, the standard normal's upper quantile; 0 at 0.5."""
    return -float(special.ndtri(alpha)) + 0.0


def verdict(lower: float, upper: float, margin: float) -> Verdict:
    """PASS if lower > −margin, FAIL if upper < −margin, else INCONCLUSIVE.

    The bounds are one-sided ones of the difference candidate − reference, all in the score's units. Choose the margin
    before anything is evaluated.

    Raises: EvaluationError for a margin that is not positive, NaN, or `lower` above `upper`.

    Example:
        >>> verdict(-0.012, 0.004, margin=0.02)
        'PASS'
        >>> verdict(-0.031, -0.004, margin=0.02)
        'INCONCLUSIVE'
    """
    low, high, margin = as_number("lower", lower), as_number("upper", upper), as_margin(margin)
    if low > high:
        raise EvaluationError(f"`lower` must not exceed `upper`; got {lower} and {upper}.")
    if low > -margin:
        return "PASS"
    return "FAIL" if high < -margin else "INCONCLUSIVE"


def documents_needed(
    standard_deviation: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    binary_documents: int | None = None,
) -> int:
    """Documents with which a candidate as good as the reference PASSes with probability `power`.

    ⌈((z_{1−α} + z_power) s / m)²⌉, with s the standard deviation of one document's difference, and m the margin in the
    same units. For binary scores give `binary_documents`, the number n of documents that s comes from: s² is then at
    least z_{1−α}²/(n + z_{1−α}²), since few documents without a discordant pair do not show that there are none.

    Raises: EvaluationError for a negative or infinite standard deviation, a margin that is not positive, alpha outside
    (0, 0.5], power outside [0.5, 1), or `binary_documents` below 1.

    Example:
        >>> documents_needed(0.18, margin=0.02)
        501
    """
    alpha, margin, power = as_alpha(alpha), as_margin(margin), as_power(power)
    deviation = as_number("standard_deviation", standard_deviation)
    if not 0 <= deviation < math.inf:
        raise EvaluationError(f"`standard_deviation` must be finite and not negative; got {standard_deviation!r}.")
    if binary_documents is not None:
        deviation = math.sqrt(max(deviation**2, variance_floor(binary_documents, alpha)))
    ratio = (z_quantile(alpha) + z_quantile(1 - power)) * deviation / margin
    if not math.isfinite(ratio * ratio):
        raise EvaluationError(f"`margin` {margin} is too small beside `standard_deviation` {deviation}.")
    return max(1, math.ceil(ratio * ratio))


def variance_floor(n: int, alpha: float) -> float:
    """Least variance of a binary difference that n documents can show: Tango's bound with no discordant pair."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise EvaluationError(f"`binary_documents` must be a positive integer; got {n!r}.")
    z = z_quantile(alpha)
    return z * z / (n + z * z)


def control_p_value(edit: float, controls: Any) -> float:
    """p-value of an edit's score against those of K random controls: (1 + #{control ≥ edit}) / (K + 1).

    Higher is better. The smallest value is 1/(K + 1), so that p ≤ 0.05 takes at least 19 controls. Controls must be
    scored on the documents that the edit is scored on, and these must not have chosen the edit.

    Raises: EvaluationError for scores that are empty, not finite or not one-dimensional.
    Reference: Phipson and Smyth, "Permutation p-values should never be zero", 2010.

    Example:
        >>> control_p_value(0.31, [0.1 + 0.01 * i for i in range(19)])
        0.05
    """
    scores = as_scores("controls", controls)
    value = as_number("edit", edit)
    if math.isinf(value):
        raise EvaluationError(f"`edit` must be finite; got {edit!r}.")
    return (1 + int((scores >= value).sum())) / (scores.size + 1)
