"""Each side trained from several seeds, paired by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lorakit.errors import EvaluationError
from lorakit.statistics._inputs import Floats, as_alpha, as_groups, as_margin, as_pair, as_power, differences, is_binary
from lorakit.statistics._interval import Interval, mean_and_error, t_bounds
from lorakit.statistics._paired import discordant, tango_bounds
from lorakit.statistics._verdict import documents_needed, variance_floor, z_quantile

MIN_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class SeedsInterval(Interval):
    """The difference of two ways to train, over seeds and documents.

    standard_error² = standard_error_seeds² + standard_error_documents². This counts the interaction of seeds and
    documents twice, and so errs on the large side. `n` counts documents; `seed_differences` are the seeds' means.
    """

    seed_differences: tuple[float, ...]
    standard_error_seeds: float
    standard_error_documents: float
    num_groups: int | None
    binary: bool

    @property
    def worst_seed_difference(self) -> float:
        """The smallest of the seeds' mean differences."""
        return min(self.seed_differences)

    def within_policy(self, tolerance: float = 0.025) -> bool:
        """Gradience's policy: no seed's mean lies more than `tolerance` below the reference's. Not a test by itself."""
        return self.worst_seed_difference >= -as_margin(tolerance, "tolerance")

    def documents_needed(self, margin: float, *, power: float = 0.8) -> int | None:
        """Documents with which as many seeds would PASS a candidate as good as the reference; None if none are enough.

        By normal quantiles: with few seeds somewhat too few. More documents do not reduce the variance between seeds.
        """
        margin, power = as_margin(margin), as_power(power)
        variance = self.standard_error_documents**2 * self.n
        if self.binary:
            variance = max(variance, variance_floor(self.n, self.alpha))
        allowed = margin / (z_quantile(self.alpha) + z_quantile(1 - power))
        if allowed <= self.standard_error_seeds:
            return None
        share = math.sqrt(1 - (self.standard_error_seeds / allowed) ** 2)
        return documents_needed(math.sqrt(variance), margin * share, alpha=self.alpha, power=power)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's types, with the worst seed's mean."""
        fields = super().to_dict()
        return fields | {
            "seed_differences": list(self.seed_differences),
            "worst_seed_difference": self.worst_seed_difference,
        }


def seeds_interval(
    reference_scores: Any, candidate_scores: Any, *, alpha: float = 0.05, groups: Any = None
) -> SeedsInterval:
    """Difference candidate − reference over S seeds and n documents, with one-sided bounds, each at level `alpha`.

    Row s of both arrays comes from seed s. SE² = SE²_seeds + SE²_documents, from the means over documents and over
    seeds; t bounds with Satterthwaite's degrees of freedom, SE⁴ / (SE⁴_seeds/(S − 1) + SE⁴_documents/(n − 1)). Where
    every score is 0 or 1, SE_documents is at least the mean over seeds of (difference − Tango's lower bound)/z. With
    `groups`, SE_documents is the cluster-robust one, with G − 1 in place of n − 1.

    Args:
        reference_scores, candidate_scores: (S, n), S >= 3 and n >= 2, higher is better.
        alpha: in (0, 0.5]. groups: (n,), the label of each document's group, or None.

    Raises: EvaluationError for fewer than 3 seeds or 2 documents, different shapes, scores that are not finite
    numbers, alpha outside (0, 0.5], or groups that do not fit.
    Reference: Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics 2, 1946.

    Example:
        >>> reference = [[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1]]
        >>> candidate = [[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1]]
        >>> interval = seeds_interval(reference, candidate)
        >>> round(interval.difference, 3), round(interval.lower, 3), round(interval.worst_seed_difference, 3)
        (0.0, -0.432, -0.167)
    """
    alpha = as_alpha(alpha)
    reference, candidate = as_pair(reference_scores, candidate_scores, ndim=2)
    seeds, n = reference.shape
    if seeds < MIN_SEEDS or n < 2:
        raise EvaluationError(
            f"`reference_scores` must have at least {MIN_SEEDS} seeds and 2 documents; got shape {reference.shape}. "
            "With fewer seeds their spread cannot be told: compare one pair by `paired_interval`."
        )
    codes = None if groups is None else as_groups(groups, n)
    d = differences(reference, candidate)
    seed_means = d.mean(1)
    difference, seed_error, seed_degrees = mean_and_error(seed_means)
    _, document_error, document_degrees = mean_and_error(d.mean(0), codes)
    binary = is_binary(reference, candidate)
    if binary and alpha < 0.5:
        document_error = max(document_error, _tango_floor(reference, candidate, alpha))
    error = math.hypot(seed_error, document_error)
    degrees = float(seed_degrees)
    if error > 0:
        shares = (seed_error / error) ** 2, (document_error / error) ** 2
        degrees = 1 / (shares[0] ** 2 / seed_degrees + shares[1] ** 2 / document_degrees)
    lower, upper = t_bounds(difference, error, degrees, alpha)
    return SeedsInterval(
        difference=difference,
        lower=lower,
        upper=upper,
        alpha=alpha,
        n=n,
        method="seeds-t" if codes is None else "seeds-cluster-t",
        standard_error=error,
        degrees_of_freedom=degrees,
        seed_differences=tuple(float(mean) for mean in seed_means),
        standard_error_seeds=seed_error,
        standard_error_documents=document_error,
        num_groups=None if codes is None else document_degrees + 1,
        binary=binary,
    )


def _tango_floor(reference: Floats, candidate: Floats, alpha: float) -> float:
    """Mean over seeds of (difference − Tango's lower bound)/z."""
    n = reference.shape[1]
    reaches: list[float] = []
    for first, second in zip(reference, candidate, strict=True):
        b, c = discordant(first, second)
        reaches.append((b - c) / n - tango_bounds(b, c, n, alpha)[0])
    return sum(reaches) / len(reaches) / z_quantile(alpha)
