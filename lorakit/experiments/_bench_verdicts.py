"""From a bench's scores to its gate and its verdicts: no models, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.statistics import SeedsInterval, Verdict, combine_tasks, compare_candidates, seeds_interval

SeedScores = Sequence[Sequence[float]]  # of each seed, a score a document


@dataclass(frozen=True)
class BenchScores:
    """Every score of a bench by task, in the order of `documents`; of the probe and the variants, for each seed."""

    documents: Mapping[str, tuple[str, ...]]
    base: Mapping[str, tuple[float, ...]]
    probe: Mapping[str, tuple[tuple[float, ...], ...]]
    variants: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]


@dataclass(frozen=True)
class BenchGate:
    """What the probe gains over the base model on one task, over seeds and documents.

    `passed`: `lower`, a one-sided bound, lies above `minimum`.
    """

    task: str
    minimum: float
    base_mean: float
    probe_mean: float
    gain: float
    lower: float
    upper: float
    worst_seed_gain: float
    passed: bool


@dataclass(frozen=True)
class BenchTask:
    """A variant against the probe on one task: variant − probe, paired by seed and document.

    Bounds are one-sided, each at the bench's alpha; `verdict` is of this task and variant alone. `within_tolerance`:
    no seed's mean lies more than the tolerance below the probe's (Gradience's policy); None without a tolerance.
    """

    name: str
    margin: float
    verdict: Verdict
    probe_mean: float
    variant_mean: float
    difference: float
    lower: float
    upper: float
    seed_differences: tuple[float, ...]
    worst_seed_difference: float
    within_tolerance: bool | None
    documents: int
    documents_needed: int | None


@dataclass(frozen=True)
class Judgement:
    """One variant's verdict among all of them, after Holm, and its tasks; `headline` is the one nearest its margin."""

    verdict: Verdict
    pass_p_value: float
    fail_p_value: float
    headline: str
    tasks: tuple[BenchTask, ...]


def gates(scores: BenchScores, minimum: Mapping[str, float], alpha: float) -> tuple[BenchGate, ...]:
    """One row a task. Raises: as `lorakit.statistics.seeds_interval`."""
    rows = []
    for task, least in minimum.items():
        probe = scores.probe[task]
        interval = seeds_interval([scores.base[task]] * len(probe), probe, alpha=alpha)
        rows.append(
            BenchGate(
                task=task,
                minimum=least,
                base_mean=_mean(scores.base[task]),
                probe_mean=_mean([_mean(one) for one in probe]),
                gain=interval.difference,
                lower=interval.lower,
                upper=interval.upper,
                worst_seed_gain=interval.worst_seed_difference,
                passed=interval.lower > least,
            )
        )
    return tuple(rows)


def judge(
    scores: BenchScores, margins: Mapping[str, float], alpha: float, tolerance: float | None
) -> dict[str, Judgement]:
    """The verdict of every variant, with Holm's adjustment over them.

    Raises: as `lorakit.statistics.seeds_interval`.
    """
    intervals = {
        name: {task: seeds_interval(scores.probe[task], seeds[task], alpha=alpha) for task in margins}
        for name, seeds in scores.variants.items()
    }
    if not intervals:
        return {}
    together = compare_candidates(intervals, margins)
    return {
        name: Judgement(
            verdict=together.verdicts[name],
            pass_p_value=together.pass_p_values[name],
            fail_p_value=together.fail_p_values[name],
            headline=combine_tasks(own, margins).headline,
            tasks=tuple(
                _task(task, interval, margins[task], tolerance, scores.probe[task], scores.variants[name][task])
                for task, interval in own.items()
            ),
        )
        for name, own in intervals.items()
    }


def overall(gate: Sequence[BenchGate], verdicts: Sequence[Verdict]) -> Verdict:
    """PASS where a variant PASSes, FAIL where all of them FAIL, else INCONCLUSIVE; so too where the gate holds."""
    return best_of(verdicts) if all(row.passed for row in gate) else "INCONCLUSIVE"


def best_of(verdicts: Sequence[Verdict]) -> Verdict:
    """PASS where one of several candidates PASSes, FAIL where all of them FAIL, else INCONCLUSIVE; so too of none."""
    if "PASS" in verdicts:
        return "PASS"
    return "FAIL" if set(verdicts) == {"FAIL"} else "INCONCLUSIVE"


def _task(
    name: str,
    interval: SeedsInterval,
    margin: float,
    tolerance: float | None,
    probe: SeedScores,
    variant: SeedScores,
) -> BenchTask:
    return BenchTask(
        name=name,
        margin=margin,
        verdict=interval.verdict(margin),
        probe_mean=_mean([_mean(one) for one in probe]),
        variant_mean=_mean([_mean(one) for one in variant]),
        difference=interval.difference,
        lower=interval.lower,
        upper=interval.upper,
        seed_differences=interval.seed_differences,
        worst_seed_difference=interval.worst_seed_difference,
        within_tolerance=None if tolerance is None else interval.within_policy(tolerance),
        documents=interval.n,
        documents_needed=interval.documents_needed(margin),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
