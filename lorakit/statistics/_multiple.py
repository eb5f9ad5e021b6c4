"""Several tasks, several candidates, and ladders: verdicts whose error rates hold for all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from lorakit.errors import EvaluationError
from lorakit.statistics._inputs import Floats, as_margin, as_scores
from lorakit.statistics._interval import Interval
from lorakit.statistics._verdict import Verdict

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class TaskVerdicts:
    """The verdict over several tasks.

    `headline` is the task nearest its margin among those that decide the verdict. `fail_p_values` are Holm's, of the
    tests that the difference lies below −margin; `verdicts` are each task's, FAIL being Holm's.
    """

    verdict: Verdict
    headline: str
    alpha: float
    verdicts: Mapping[str, Verdict]
    margins: Mapping[str, float]
    fail_p_values: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class CandidateVerdicts:
    """Each candidate's verdict among several tested side by side, with Holm's p-values for PASS and for FAIL."""

    alpha: float
    verdicts: Mapping[str, Verdict]
    pass_p_values: Mapping[str, float]
    fail_p_values: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class FixedSequence(Generic[Candidate]):
    """A ladder's tests in order; the last one is the first that did not PASS, if any."""

    steps: tuple[tuple[Candidate, Verdict], ...]

    @property
    def last_passing(self) -> Candidate | None:
        """The last candidate that PASSed; None if the first did not."""
        passing = [candidate for candidate, verdict in self.steps if verdict == "PASS"]
        return passing[-1] if passing else None


def holm(p_values: Any) -> Floats:
    """Holm's adjusted p-values, in the order given: reject those below α, at a family-wise error of at most α.

    Raises: EvaluationError unless `p_values` is (k,) with k >= 1 and every value in [0, 1].
    Reference: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6,
    1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = as_scores("p_values", p_values)
    if ((p < 0) | (p > 1)).any():
        raise EvaluationError(f"`p_values` must be in [0, 1]; got {p[(p < 0) | (p > 1)][0]}.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1)
    return adjusted


def combine_tasks(intervals: Mapping[str, Interval], margins: float | Mapping[str, float]) -> TaskVerdicts:
    """One verdict over several tasks, each with its interval and margin.

    PASS if every task PASSes at α (an intersection–union test: no adjustment is needed). FAIL if any task's p-value of
    the test "difference < −margin" is below α after Holm's adjustment over the tasks. Else INCONCLUSIVE. The headline
    is, of the tasks whose verdict is the combined one, that with the smallest (lower + margin)/margin.

    Args:
        intervals: each task's interval by the task's name, all at the same alpha.
        margins: one margin for all tasks, or each task's by its name, in the units of its score.

    Raises: EvaluationError for no task, different alphas, or a margin that is missing, unknown or not positive.
    References: Berger, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24, 1982; Holm, 1979.

    Example:
        >>> from lorakit.statistics import paired_interval
        >>> same = paired_interval([1, 0] * 200, [1, 0] * 200)
        >>> worse = paired_interval([1, 1] * 200, [1, 0] * 200)
        >>> combine_tasks({"arc": same, "piqa": same}, 0.02).verdict
        'PASS'
        >>> result = combine_tasks({"arc": same, "piqa": worse}, {"arc": 0.02, "piqa": 0.05})
        >>> result.verdict, result.headline
        ('FAIL', 'piqa')
    """
    alpha = _common_alpha(intervals.values())
    by_task = _task_margins(intervals, margins)
    adjusted = holm([interval.p_value(-by_task[name], alternative="less") for name, interval in intervals.items()])
    fail_p_values = dict(zip(intervals, adjusted.tolist(), strict=True))
    verdicts: dict[str, Verdict] = {}
    for name, interval in intervals.items():
        alone = interval.verdict(by_task[name])
        verdicts[name] = "INCONCLUSIVE" if alone == "FAIL" and fail_p_values[name] >= alpha else alone
    found = set(verdicts.values())
    combined: Verdict = "FAIL" if "FAIL" in found else "INCONCLUSIVE" if "INCONCLUSIVE" in found else "PASS"
    deciding = [name for name in intervals if verdicts[name] == combined]
    headline = min(deciding, key=lambda name: (intervals[name].lower + by_task[name]) / by_task[name])
    return TaskVerdicts(combined, headline, alpha, verdicts, by_task, fail_p_values)


def compare_candidates(
    candidates: Mapping[str, Mapping[str, Interval]], margins: float | Mapping[str, float]
) -> CandidateVerdicts:
    """Verdicts of several candidates tested side by side, each on one or more tasks.

    A candidate's p-value for PASS is the largest of its tasks' (intersection–union), that for FAIL the smallest of its
    tasks' after Holm. Each of the two is adjusted over the candidates by Holm: the probability that any verdict of PASS
    is wrong is at most α, and likewise for FAIL. For a ladder in an order fixed beforehand, `fixed_sequence` has more
    power.

    Args:
        candidates: by the candidate's name, each task's interval by the task's name, all at the same alpha.
        margins: one margin for all tasks, or each task's by its name.

    Raises: EvaluationError for no candidate, candidates with different tasks, different alphas, or margins that do not
    fit.
    Reference: Holm, 1979.

    Example:
        >>> from lorakit.statistics import paired_interval
        >>> reference = [1, 0] * 200
        >>> worse = paired_interval(reference, [0] * 400)
        >>> same = paired_interval(reference, reference)
        >>> compare_candidates({"rank 8": {"arc": same}, "rank 4": {"arc": worse}}, 0.02).verdicts
        {'rank 8': 'PASS', 'rank 4': 'FAIL'}
    """
    tasks = {frozenset(intervals) for intervals in candidates.values()}
    if len(tasks) != 1:
        raise EvaluationError(
            "`candidates` must all have the same tasks; got "
            f"{sorted(sorted(names) for names in tasks) or 'no candidate'}."
        )
    alpha = _common_alpha([interval for intervals in candidates.values() for interval in intervals.values()])
    passing, failing = [], []
    for intervals in candidates.values():
        by_task = _task_margins(intervals, margins)
        passing.append(max(interval.p_value(-by_task[name]) for name, interval in intervals.items()))
        failing.append(min(combine_tasks(intervals, by_task).fail_p_values.values()))
    pass_p_values = dict(zip(candidates, holm(passing).tolist(), strict=True))
    fail_p_values = dict(zip(candidates, holm(failing).tolist(), strict=True))
    verdicts: dict[str, Verdict] = {
        name: "PASS" if pass_p_values[name] < alpha else "FAIL" if fail_p_values[name] < alpha else "INCONCLUSIVE"
        for name in candidates
    }
    return CandidateVerdicts(alpha, verdicts, pass_p_values, fail_p_values)


def fixed_sequence(candidates: Iterable[Candidate], test: Callable[[Candidate], Verdict]) -> FixedSequence[Candidate]:
    """Test candidates in an order fixed beforehand, and stop at the first that does not PASS.

    Each is tested at the full α, on the same documents, and yet the probability that any wrong candidate PASSes is at
    most α. `test` is called for no candidate after the one that stops the sequence.

    Raises: EvaluationError for no candidate, or a `test` that returns something other than a verdict.
    Reference: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays:
    a-priori ordered hypotheses", 1995.

    Example:
        >>> result = fixed_sequence([16, 8, 4, 2], lambda rank: "PASS" if rank >= 8 else "INCONCLUSIVE")
        >>> result.last_passing, result.steps
        (8, ((16, 'PASS'), (8, 'PASS'), (4, 'INCONCLUSIVE')))
    """
    steps: list[tuple[Candidate, Verdict]] = []
    for candidate in candidates:
        outcome = test(candidate)
        if outcome not in ("PASS", "FAIL", "INCONCLUSIVE"):
            raise EvaluationError(f'`test` must return "PASS", "FAIL" or "INCONCLUSIVE"; got {outcome!r}.')
        steps.append((candidate, outcome))
        if outcome != "PASS":
            break
    if not steps:
        raise EvaluationError("`candidates` must have at least one candidate; got none.")
    return FixedSequence(tuple(steps))


def _common_alpha(intervals: Iterable[Interval]) -> float:
    alphas = sorted({interval.alpha for interval in intervals})
    if len(alphas) != 1:
        raise EvaluationError(f"`intervals` must be at least one, all at the same alpha; got {alphas or 'none'}.")
    return alphas[0]


def _task_margins(intervals: Mapping[str, Interval], margins: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(margins, Mapping):
        return dict.fromkeys(intervals, as_margin(margins, "margins"))
    if set(margins) != set(intervals):
        raise EvaluationError(
            f"`margins` must have each task's margin; got {sorted(margins)} for the tasks {sorted(intervals)}."
        )
    return {name: as_margin(margins[name], f"margins[{name!r}]") for name in intervals}
