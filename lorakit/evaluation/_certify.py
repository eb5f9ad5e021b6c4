"""Reference against candidate: a verdict at a margin that is fixed before the first score is computed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lorakit._checks import check_number
from lorakit._report import Report
from lorakit.errors import EvaluationError
from lorakit.evaluation._certificate import Certificate, CertifiedTask, interval_of
from lorakit.evaluation._evaluate import environment, evaluate, seeds_of, tasks_of
from lorakit.evaluation._models import (
    LoadOptions,
    adapted,
    adapter_digest,
    base_digest,
    label_of,
    load_base,
    load_tokenizer,
)
from lorakit.evaluation._scores import Scores, aligned, digest
from lorakit.evaluation._tasks import Task
from lorakit.statistics import combine_tasks

PLAN_DOCUMENTS = 50


@dataclass(frozen=True, repr=False)
class CertificationPlan(Report):
    """What a verdict will take: for each task, documents and minutes, from `PLAN_DOCUMENTS` documents scored.

    `documents_needed` is for a candidate as good as the reference, with a probability of 0.8 to PASS.
    """

    margin: float
    alpha: float
    minutes: float
    tasks: tuple[dict[str, Any], ...]

    @property
    def headline(self) -> str:
        """What it will take, in a line."""
        needs = ", ".join(f"{row['documents_needed']} documents of {row['name']}" for row in self.tasks)
        return f"A verdict at margin {self.margin:g} needs about {needs}: {self.minutes:.1f} minutes."

    def rows(self) -> list[dict[str, Any]]:
        """One row a task."""
        return [dict(row) for row in self.tasks]


def certify(
    base: Any,
    reference: Any,
    candidate: Any,
    *,
    tasks: Any,
    margin: float,
    alpha: float = 0.05,
    guards: Any = (),
    groups: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    plan: bool = False,
    used_documents: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    progress: bool = True,
) -> Any:
    """Whether the candidate is as good as the reference on every task, within a margin.

    Args:
        base: the base model: a path, a Hub id or a model.
        reference, candidate: an adapter each (a path, a Hub id or a PeftModel), or a list of at least three seeds of
            it, paired by their place.
        tasks: a task or several; see `lorakit.evaluation.choices` and the functions beside it. Paths and names too.
        margin: how much worse the candidate may be, in the units of the scores; a task's own margin wins.
        alpha: the level of each one-sided bound.
        guards: more tasks on which the candidate must not be worse, at their own margins or `margin`.
        groups: by a task's name, which passage each of its documents belongs to.
        tokenizer: None: from beside the reference, else the base model's.
        limit: how many documents of each task at most.
        plan: score 50 documents and say what a verdict at this margin will take; a `CertificationPlan`.
        used_documents: hashes of documents that calibration or selection has used; a task that has one is refused.
        cache: a directory for results, so that a reference is evaluated once.
        options: how the base model is loaded.
        progress: show progress bars on stderr.
    Returns: a `Certificate`, or with `plan` a `CertificationPlan`.
    Raises: EvaluationError for adapters that do not fit or are not applied, different prompts or dtypes of the two
        sides, documents that are missing, there twice or used before, and scores that are not finite.

    Example:
        >>> import lorakit
        >>> task = lorakit.evaluation.choices("test.jsonl")  # doctest: +SKIP
        >>> lorakit.evaluation.certify("base/", "adapter/", "small/", tasks=task, margin=0.02)  # doctest: +SKIP
    """
    options = options or LoadOptions()
    wanted, guarded = tasks_of(tasks), tasks_of(guards) if guards else []
    everything = tasks_of([*wanted, *guarded])
    check_number("margin", margin, above=0)
    if check_number("alpha", alpha, above=0, most=0.5) >= 0.5:
        raise EvaluationError(f"`alpha` must be below 0.5; got {alpha!r}.")
    margins = {task.name: margin if task.margin is None else task.margin for task in everything}
    sides = {"reference": seeds_of(reference), "candidate": seeds_of(candidate)}
    if len(sides["reference"]) != len(sides["candidate"]) or len(sides["reference"]) == 2:
        raise EvaluationError(
            f"Give one adapter a side, or at least three seeds of each; got {len(sides['reference'])} and "
            f"{len(sides['candidate'])}."
        )
    model = load_base(base, options)
    tokenizer = load_tokenizer(base, sides["reference"][0], options) if tokenizer is None else tokenizer
    started = time.perf_counter()
    scores = {
        side: [_scored(model, adapter, everything, tokenizer, PLAN_DOCUMENTS if plan else limit, cache, progress)
               for adapter in adapters]
        for side, adapters in sides.items()
    }  # fmt: skip
    seconds = time.perf_counter() - started
    _refuse_used(scores["reference"][0], set(used_documents))
    if plan:
        return _plan(scores, everything, margins, alpha, margin, seconds)
    guards_by_name = {task.name for task in guarded}
    rows = _rows(scores, everything, margins, alpha, groups or {}, guards_by_name)
    return _certificate(rows, scores, model, base, sides, margins, alpha, margin)


def evaluate_adapters(
    base: Any,
    adapters: Sequence[Any],
    tasks: Any,
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Scores]]:
    """The scores of several adapters of one base model, by adapter and task; arguments and errors as in `certify`."""
    options = options or LoadOptions()
    wanted = tasks_of(tasks)
    model = load_base(base, options)
    found = {}
    for adapter in adapters:
        own = load_tokenizer(base, adapter, options) if tokenizer is None else tokenizer
        found[label_of(adapter)] = _scored(model, adapter, wanted, own, limit, cache, progress)
    return found


def _scored(
    model: Any, adapter: Any, tasks: list[Task], tokenizer: Any, limit: int | None, cache: Any, progress: bool
) -> dict[str, Scores]:
    with adapted(model, adapter) as with_adapter:
        found = evaluate(with_adapter, tasks, tokenizer=tokenizer, limit=limit, cache=cache, progress=progress)
    return {name: replace(one, model=label_of(adapter)) for name, one in found.items()}


def _refuse_used(scores: dict[str, Scores], used: set[str]) -> None:
    for name, one in scores.items():
        again = used.intersection(one.documents)
        if again:
            raise EvaluationError(
                f"{len(again)} documents of task {name!r} were used for calibration or selection: a verdict on them "
                f"would be too good. Take them out of the task."
            )


def _aligned(scores: dict[str, list[dict[str, Scores]]], name: str) -> tuple[list[list[float]], list[list[float]]]:
    first = scores["reference"][0][name]
    reference = [aligned(first, one[name]) for one in scores["reference"]]
    return reference, [aligned(first, one[name]) for one in scores["candidate"]]


def _rows(
    scores: dict[str, list[dict[str, Scores]]],
    tasks: list[Task],
    margins: dict[str, float],
    alpha: float,
    groups: Mapping[str, Sequence[Any]],
    guards: set[str],
) -> tuple[CertifiedTask, ...]:
    intervals, pairs = {}, {}
    for task in tasks:
        pairs[task.name] = _aligned(scores, task.name)
        intervals[task.name] = interval_of(*pairs[task.name], alpha, groups.get(task.name))
    combined = combine_tasks(intervals, margins)
    rows = []
    for task in tasks:
        interval, (reference, candidate) = intervals[task.name], pairs[task.name]
        first = scores["reference"][0][task.name]
        rows.append(
            CertifiedTask(
                name=task.name,
                guard=task.name in guards,
                margin=margins[task.name],
                verdict=combined.verdicts[task.name],
                difference=interval.difference,
                lower=interval.lower,
                upper=interval.upper,
                n=len(first.documents),
                method=interval.method,
                candidate_only=getattr(interval, "candidate_only", None),
                reference_only=getattr(interval, "reference_only", None),
                documents_needed=interval.documents_needed(margins[task.name]),
                worst_seed_difference=getattr(interval, "worst_seed_difference", None),
                reference_mean=_mean(reference),
                candidate_mean=_mean(candidate),
                base_mean=None,
                documents=first.documents,
                reference_scores=tuple(map(tuple, reference)),
                candidate_scores=tuple(map(tuple, candidate)),
                settings=dict(first.settings),
            )
        )
    return tuple(rows)


def _certificate(
    rows: tuple[CertifiedTask, ...],
    scores: dict[str, list[dict[str, Scores]]],
    model: Any,
    base: Any,
    sides: dict[str, list[Any]],
    margins: dict[str, float],
    alpha: float,
    margin: float,
) -> Certificate:
    intervals = {row.name: interval_of(row.reference_scores, row.candidate_scores, alpha) for row in rows}
    combined = combine_tasks(intervals, margins)
    headline = next(row for row in rows if row.name == combined.headline)
    hashes = {
        "base": base_digest(model),
        **{side: [adapter_digest(adapter) for adapter in adapters] for side, adapters in sides.items()},
        "scores": {side: [{n: s.digest() for n, s in one.items()} for one in found] for side, found in scores.items()},
    }
    certificate = Certificate(
        verdict=combined.verdict,
        alpha=alpha,
        margin=headline.margin,
        difference=headline.difference,
        lower=headline.lower,
        upper=headline.upper,
        documents_needed=headline.documents_needed,
        headline_task=headline.name,
        base=label_of(base),
        reference=tuple(map(label_of, sides["reference"])),
        candidate=tuple(map(label_of, sides["candidate"])),
        hashes=hashes,
        environment={**environment(), "device": str(model.device)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tasks=rows,
    )
    content = {key: value for key, value in certificate.to_dict().items() if key != "sha256"}
    return replace(certificate, sha256=digest(content))


def _plan(
    scores: dict[str, list[dict[str, Scores]]],
    tasks: list[Task],
    margins: dict[str, float],
    alpha: float,
    margin: float,
    seconds: float,
) -> CertificationPlan:
    rows: list[dict[str, Any]] = []
    scored = sum(len(scores["reference"][0][task.name].documents) for task in tasks)
    for task in tasks:
        interval = interval_of(*_aligned(scores, task.name), alpha)
        needed = interval.documents_needed(margins[task.name])
        minutes = math.inf if needed is None else seconds / 60 * needed / max(1, scored)
        rows.append(
            {
                "name": task.name,
                "margin": margins[task.name],
                "documents_scored": len(scores["reference"][0][task.name].documents),
                "documents_needed": needed,
                "minutes": None if math.isinf(minutes) else minutes,
            }
        )
    return CertificationPlan(margin, alpha, sum(row["minutes"] or 0.0 for row in rows), tuple(rows))


def _mean(scores: list[list[float]]) -> float:
    return math.fsum(math.fsum(one) / len(one) for one in scores) / len(scores)
