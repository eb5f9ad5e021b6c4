"""From the scores of several methods to their differences from one of them: no models, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.evaluation._scores import interval_of, mean_of
from lorakit.experiments._bench_verdicts import best_of
from lorakit.statistics import Interval, Verdict, compare_candidates, holm

Outcome = Literal["better", "worse", "not shown"]
SeedScores = tuple[tuple[float, ...], ...]  # of each seed, a score (or predicted class) a document


@dataclass(frozen=True)
class MethodScores:
    """Every score of a comparison by task, in the order of `documents`; of each method, for each seed.

    Of a task with a corpus metric the scores are predicted classes, and `labels` the true ones.
    """

    documents: Mapping[str, tuple[str, ...]]
    metrics: Mapping[str, str | None]
    labels: Mapping[str, tuple[float, ...] | None]
    methods: Mapping[str, Mapping[str, SeedScores]]


@dataclass(frozen=True)
class MethodTask:
    """A method on one task, and its difference method − reference there, paired by seed and document.

    `mean` is over seeds. Bounds are one-sided, each at the comparison's alpha, of this method and task alone;
    `better_p_value` and `worse_p_value`, of the tests that the difference lies above and below 0, are Holm's over all
    methods on this task, and `outcome` follows from them. All are None of the reference itself.
    """

    name: str
    metric: str | None
    documents: int
    mean: float
    seed_means: tuple[float, ...]
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    seed_differences: tuple[float, ...] | None = None
    better_p_value: float | None = None
    worse_p_value: float | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True)
class MethodVerdict:
    """Whether a method is as good as the reference within the margins, on every task; Holm's over the methods."""

    verdict: Verdict
    pass_p_value: float
    fail_p_value: float


def compared(scores: MethodScores, reference: str, alpha: float) -> dict[str, tuple[MethodTask, ...]]:
    """Each method's tasks. Raises: as `lorakit.statistics.seeds_interval`."""
    others = [name for name in scores.methods if name != reference]
    found: dict[str, list[MethodTask]] = {name: [] for name in scores.methods}
    for task in scores.documents:
        intervals = {name: interval_between(scores, reference, name, task, alpha) for name in others}
        better = _adjusted([one.p_value(0.0) for one in intervals.values()])
        worse = _adjusted([one.p_value(0.0, alternative="less") for one in intervals.values()])
        found[reference].append(_of(scores, reference, task))
        for name, up, down in zip(others, better, worse, strict=True):
            found[name].append(_against(_of(scores, name, task), intervals[name], up, down))
    return {name: tuple(rows) for name, rows in found.items()}


def verdicts(
    scores: MethodScores, reference: str, margins: Mapping[str, float], alpha: float
) -> dict[str, MethodVerdict]:
    """Every other method's verdict at these margins. Raises: as `lorakit.statistics.compare_candidates`."""
    intervals = {
        name: {task: interval_between(scores, reference, name, task, alpha) for task in margins}
        for name in scores.methods
        if name != reference
    }
    if not intervals:
        return {}
    together = compare_candidates(intervals, margins)
    return {
        name: MethodVerdict(together.verdicts[name], together.pass_p_values[name], together.fail_p_values[name])
        for name in intervals
    }


def overall(found: Sequence[Verdict]) -> Verdict | None:
    """PASS where a method PASSes, FAIL where all of them FAIL, else INCONCLUSIVE; None without verdicts."""
    return best_of(found) if found else None


def interval_between(scores: MethodScores, reference: str, name: str, task: str, alpha: float) -> Interval:
    """name − reference on a task, paired by seed and document."""
    first, second = scores.methods[reference][task], scores.methods[name][task]
    return interval_of(first, second, alpha, metric=scores.metrics[task], labels=scores.labels[task])


def _of(scores: MethodScores, name: str, task: str) -> MethodTask:
    metric, labels = scores.metrics[task], scores.labels[task]
    means = tuple(mean_of(seed, metric, labels) for seed in scores.methods[name][task])
    return MethodTask(task, metric, len(scores.documents[task]), math.fsum(means) / len(means), means)


def _against(row: MethodTask, interval: Interval, better: float, worse: float) -> MethodTask:
    outcome: Outcome = "better" if better < interval.alpha else "worse" if worse < interval.alpha else "not shown"
    return MethodTask(
        name=row.name,
        metric=row.metric,
        documents=row.documents,
        mean=row.mean,
        seed_means=row.seed_means,
        difference=interval.difference,
        lower=interval.lower,
        upper=interval.upper,
        seed_differences=tuple(getattr(interval, "seed_differences", ())),
        better_p_value=better,
        worse_p_value=worse,
        outcome=outcome,
    )


def _adjusted(p_values: Sequence[float]) -> list[float]:
    found: list[float] = holm(p_values).tolist() if p_values else []
    return found
