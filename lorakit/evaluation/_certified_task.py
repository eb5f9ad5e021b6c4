"""One task of a certificate: the scores that it rests on, and the figures that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lorakit.evaluation._scores import Scores, aligned, interval_of, mean_of
from lorakit.statistics import Interval, SeedsInterval, Verdict


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a task's figures are computed from; see `CertifiedTask`."""

    name: str
    guard: bool
    margin: float
    documents: tuple[str, ...]
    groups: tuple[int, ...] | None
    metric: str | None
    labels: tuple[float, ...] | None
    reference_scores: tuple[tuple[float, ...], ...]
    candidate_scores: tuple[tuple[float, ...], ...]
    settings: Mapping[str, Any]

    def interval(self, alpha: float) -> Interval:
        """The interval of the scores."""
        return interval_of(
            self.reference_scores, self.candidate_scores, alpha, self.groups, metric=self.metric, labels=self.labels
        )

    def certified(self, alpha: float, tolerance: float | None) -> CertifiedTask:
        """The task with its figures, and its verdict by itself."""
        interval = self.interval(alpha)
        seeds = interval if isinstance(interval, SeedsInterval) else None
        return CertifiedTask(
            **{field.name: getattr(self, field.name) for field in fields(Evidence)},
            verdict=interval.verdict(self.margin),
            difference=interval.difference,
            lower=interval.lower,
            upper=interval.upper,
            n=len(self.documents),
            method=interval.method,
            candidate_only=getattr(interval, "candidate_only", None),
            reference_only=getattr(interval, "reference_only", None),
            mcnemar_p_value=getattr(interval, "mcnemar_p_value", None),
            documents_needed=interval.documents_needed(self.margin),
            worst_seed_difference=None if seeds is None else seeds.worst_seed_difference,
            within_policy=None if seeds is None or tolerance is None else seeds.within_policy(tolerance),
            reference_mean=self._mean(self.reference_scores),
            candidate_mean=self._mean(self.candidate_scores),
        )

    def _mean(self, scores: Sequence[Sequence[float]]) -> float:
        return math.fsum(mean_of(one, self.metric, self.labels) for one in scores) / len(scores)


@dataclass(frozen=True, kw_only=True)
class CertifiedTask(Evidence):
    """One task of a certificate. Bounds are one-sided, each at the certificate's alpha.

    `reference_scores` and `candidate_scores` hold, for each seed, a score a document, in the order of `documents`; with
    a corpus metric (`metric` is "mcc", "f1" or "macro_f1") the predicted classes, and `labels` the true ones.
    `difference` is then the mean of the jackknife's pseudo-values. `groups` numbers the passage that each document
    belongs to, where several share one. `mcnemar_p_value` is McNemar's exact two-sided one, for scores of 0 and 1.
    `documents_needed` is None where more documents would not help. `within_policy` says of several seeds whether the
    worst one's mean difference lies at most the certificate's `policy_tolerance` below 0; it is no part of the verdict.
    """

    verdict: Verdict
    difference: float
    lower: float
    upper: float
    n: int
    method: str
    candidate_only: int | None
    reference_only: int | None
    mcnemar_p_value: float | None
    documents_needed: int | None
    worst_seed_difference: float | None
    within_policy: bool | None
    reference_mean: float
    candidate_mean: float

    @property
    def line(self) -> str:
        """The result in a line: before and after, the difference with its bounds, and what else is known."""
        parts = [
            f"{self.name}{' (guard)' if self.guard else ''}: {self.verdict}, {self.reference_mean:.4f} → "
            f"{self.candidate_mean:.4f} on {self.n} documents",
            f"difference {self.difference:+.4f} [{self.lower:+.4f}, {self.upper:+.4f}]",
            f"margin {self.margin:g}",
        ]
        if self.mcnemar_p_value is not None:
            alone = f"{self.reference_only} right before only, {self.candidate_only} after only"
            parts.append(f"{alone} (McNemar p = {self.mcnemar_p_value:.2g})")
        if self.worst_seed_difference is not None:
            policy = {None: "", True: " (within the policy)", False: " (outside the policy)"}[self.within_policy]
            parts.append(f"worst seed {self.worst_seed_difference:+.4f}{policy}")
        return ", ".join(parts)


def evidence_of(
    reference: Sequence[Scores],
    candidate: Sequence[Scores],
    *,
    name: str,
    margin: float,
    alpha: float,
    groups: Sequence[Any] | None = None,
    guard: bool = False,
) -> Evidence:
    """What one task's figures rest on, from a `Scores` for each seed of either side.

    Raises: as `lorakit.evaluation.compare`.
    """
    first = reference[0]
    sides = [tuple(tuple(aligned(first, one)) for one in side) for side in (reference, candidate)]
    codes = None
    if groups is not None:
        interval_of(sides[0], sides[1], alpha, groups, metric=first.metric, labels=first.labels)  # checks them
        labels = groups.tolist() if hasattr(groups, "tolist") else list(groups)
        numbers: dict[Any, int] = {}
        codes = tuple(numbers.setdefault(label, len(numbers)) for label in labels)
    return Evidence(
        name=name,
        guard=guard,
        margin=margin,
        documents=first.documents,
        groups=codes,
        metric=first.metric,
        labels=first.labels,
        reference_scores=sides[0],
        candidate_scores=sides[1],
        settings=dict(first.settings),
    )
