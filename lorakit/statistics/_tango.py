"""Tango's score test and bounds for a paired difference of proportions. Counts in, numbers out.

References: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 17, 1998.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special


def reference_only_probability(
    candidate_only: ArrayLike, reference_only: ArrayLike, n: int, difference: ArrayLike
) -> NDArray[np.float64]:
    """Maximum-likelihood probability that the reference alone is right, given the true difference.

    Tango's closed form. Broadcasts.
    """
    b = np.asarray(candidate_only, dtype=np.float64)
    c = np.asarray(reference_only, dtype=np.float64)
    difference = np.asarray(difference, dtype=np.float64)
    linear = -b - c + (2 * n - b + c) * difference
    constant = -c * difference * (1 - difference)
    root = np.sqrt(np.maximum(linear * linear - 8 * n * constant, 0))
    q: NDArray[np.float64] = np.maximum(root - linear, 0) / (4 * n)
    return q


def _numerator_and_deviation(b: ArrayLike, c: ArrayLike, n: int, difference: ArrayLike) -> tuple[Any, Any]:
    """b − c − nλ, and its standard deviation when the true difference is λ."""
    difference = np.asarray(difference, dtype=np.float64)
    difference = np.where(np.abs(difference) < 1e-150, 0, difference)  # its square would underflow
    q = reference_only_probability(b, c, n, difference)
    variance = n * (2 * q + difference * (1 - difference))
    return np.subtract(b, c) - n * difference, np.sqrt(np.maximum(variance, 0))


def score(candidate_only: ArrayLike, reference_only: ArrayLike, n: int, difference: ArrayLike) -> NDArray[np.float64]:
    """Tango's Z(λ): falls as λ, the hypothetical difference in (−1, 1), rises. Broadcasts; 0 where it would be 0/0."""
    numerator, deviation = _numerator_and_deviation(candidate_only, reference_only, n, difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        z: NDArray[np.float64] = np.where(numerator == 0, 0.0, numerator / deviation)
    return z


def p_value_greater(candidate_only: int, reference_only: int, n: int, threshold: float) -> float:
    """One-sided p-value of the score test that the true difference exceeds `threshold`."""
    if not -1 <= threshold < 1:
        return 0.0 if threshold < -1 else 1.0
    return float(special.ndtr(-score(candidate_only, reference_only, n, threshold)))


def lower_bound(candidate_only: int, reference_only: int, n: int, z: float) -> float:
    """The difference λ at which Z(λ) = z. The upper bound is minus the lower one of the swapped counts."""
    b, c = candidate_only, reference_only
    if z == 0:
        return (b - c) / n
    if b == n:
        return (n - z * z) / (n + z * z)
    if b == c == 0:
        return -z * z / (n + z * z)

    def excess(difference: float) -> float:
        # Z(λ) = z without the quotient, whose denominator is 0 at λ = −1.
        numerator, deviation = _numerator_and_deviation(b, c, n, difference)
        return float(numerator - z * deviation)

    estimate = (b - c) / n
    if excess(estimate) >= 0:  # z is below the rounding error
        return estimate
    return float(optimize.brentq(excess, -1.0, estimate, xtol=1e-15, rtol=4 * math.ulp(1.0)))
