"""What a verdict rests on: a question that is fixed beforehand, and scored sides. For the packages that ask it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lorakit._checks import check_integer, check_number
from lorakit.errors import EvaluationError
from lorakit.evaluation._attach import adapted
from lorakit.evaluation._certificate import Certificate
from lorakit.evaluation._certified_task import CertifiedTask, Evidence, evidence_of
from lorakit.evaluation._digests import adapter_digest, base_digest, digest, tokenizer_digest
from lorakit.evaluation._evaluate import environment, scored, tasks_of
from lorakit.evaluation._models import LoadOptions, label_of, load_base, load_tokenizer
from lorakit.evaluation._scores import Scores
from lorakit.evaluation._task_kinds import Task
from lorakit.statistics import combine_tasks


@dataclass(frozen=True, kw_only=True)
class Question:
    """The arguments of `certify` that say what is asked and how documents are scored, checked.

    Tasks, margins and alpha are fixed here, before the first score is computed. `wanted`, `guarded` and `margins`
    follow from the arguments: all tasks, the names of the guards, and each task's margin.
    """

    tasks: Any
    margin: float
    alpha: float = 0.05
    guards: Any = ()
    groups: Mapping[str, Sequence[Any]] | None = None
    policy_tolerance: float | None = None
    tokenizer: Any = None
    limit: int | None = None
    used_documents: Sequence[str] = ()
    cache: str | os.PathLike[str] | None = None
    options: LoadOptions | None = None
    progress: bool = True
    wanted: tuple[Task, ...] = field(init=False)
    guarded: frozenset[str] = field(init=False)
    margins: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Raises: EvaluationError, ValueError, TypeError."""
        guards = tasks_of(self.guards) if self.guards else []
        everything = tasks_of([*tasks_of(self.tasks), *guards])
        margin = check_number("margin", self.margin, above=0)
        if check_number("alpha", self.alpha, above=0, most=0.5) >= 0.5:
            raise EvaluationError(f"`alpha` must be below 0.5; got {self.alpha!r}.")
        if self.policy_tolerance is not None:
            check_number("policy_tolerance", self.policy_tolerance, above=0)
        if self.limit is not None:
            check_integer("limit", self.limit)
        names = [task.name for task in everything]
        unknown = [name for name in self.groups or {} if name not in names]
        if unknown:
            raise EvaluationError(f"`groups` names {unknown[0]!r}, which is no task; the tasks are {names}.")
        margins = {task.name: margin if task.margin is None else task.margin for task in everything}
        object.__setattr__(self, "wanted", tuple(everything))
        object.__setattr__(self, "guarded", frozenset(task.name for task in guards))
        object.__setattr__(self, "margins", margins)

    def check_unused(self, scores: Mapping[str, Scores]) -> None:
        """Raise EvaluationError for documents that calibration or selection has used."""
        used = frozenset(self.used_documents)
        for name, one in scores.items():
            again = used.intersection(one.documents)
            if again:
                raise EvaluationError(
                    f"{len(again)} documents of task {name!r} were used for calibration or selection: a verdict on "
                    f"them would be too good. Take them out of the task."
                )


@dataclass(frozen=True)
class Side:
    """A reference or the candidate: for each seed a name, a hash and its scores by task."""

    names: tuple[str, ...]
    hashes: tuple[str, ...]
    scores: tuple[dict[str, Scores], ...]


class Comparison:
    """A base model on which adapters are scored and compared under one question.

    `reference` is the adapter whose tokenizer and chat template all sides use, unless the question has a tokenizer.
    """

    def __init__(self, base: Any, question: Question, *, reference: Any = None) -> None:
        self.question = question
        self._base = label_of(base)
        self.model = load_base(base, question.options)
        self.tokenizer = question.tokenizer
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(base, reference, question.options)
        self._weights = base_digest(self.model)

    def score(self, adapters: Sequence[Any], names: Sequence[str] | None = None) -> Side:
        """The seeds of one side, scored on every task; `names` are what reports call them.

        Raises: EvaluationError for adapters that do not fit, are of another base model or are not applied, documents
            that were used before, and scores that are not finite.
        """
        names = [label_of(adapter) for adapter in adapters] if names is None else names
        question = self.question
        hashes, found = [], []
        for name, adapter in zip(names, adapters, strict=True):
            hashes.append(adapter_digest(adapter))
            weights = digest([self._weights, hashes[-1]])
            with adapted(self.model, adapter) as model:
                if model is adapter and base_digest(model) != self._weights:
                    raise EvaluationError(
                        f"The adapter in {name!r} is on a base model with other weights than {self._base!r}."
                    )
                scores = scored(
                    model,
                    question.wanted,
                    self.tokenizer,
                    limit=question.limit,
                    cache=question.cache,
                    weights=weights,
                    progress=question.progress,
                )
            question.check_unused(scores)
            found.append({task: replace(one, model=name) for task, one in scores.items()})
        return Side(tuple(names), tuple(hashes), tuple(found))

    def attached(self, adapter: Any) -> AbstractContextManager[Any]:
        """The base model with an adapter, until the block ends."""
        return adapted(self.model, adapter)

    def results(self, references: Sequence[Side], candidate: Side) -> tuple[CertifiedTask, ...]:
        """Each task's result against each reference, with its verdict among all of them."""
        alpha, tolerance = self.question.alpha, self.question.policy_tolerance
        rows = [
            self._evidence(task, side, candidate, several=len(references) > 1).certified(alpha, tolerance)
            for side in references
            for task in self.question.wanted
        ]
        margins = {row.name: row.margin for row in rows}
        verdicts = combine_tasks({row.name: row.interval(alpha) for row in rows}, margins).verdicts
        return tuple(replace(row, verdict=verdicts[row.name]) for row in rows)

    def _evidence(self, task: Task, reference: Side, candidate: Side, *, several: bool) -> Evidence:
        question = self.question
        return evidence_of(
            [scores[task.name] for scores in reference.scores],
            [scores[task.name] for scores in candidate.scores],
            name=f"{task.name} against {reference.names[0]}" if several else task.name,
            margin=question.margins[task.name],
            alpha=question.alpha,
            groups=(question.groups or {}).get(task.name),
            guard=task.name in question.guarded,
        )

    def certificate(self, references: Sequence[Side], candidate: Side) -> Certificate:
        """The verdict on scored sides, with hashes of all that it rests on.

        The candidate must be as good as every reference on every task. References have different names.
        """
        question = self.question
        rows = self.results(references, candidate)
        combined = combine_tasks(
            {row.name: row.interval(question.alpha) for row in rows}, {row.name: row.margin for row in rows}
        )
        headline = next(row for row in rows if row.name == combined.headline)
        certificate = Certificate(
            verdict=combined.verdict,
            alpha=question.alpha,
            margin=headline.margin,
            difference=headline.difference,
            lower=headline.lower,
            upper=headline.upper,
            documents_needed=headline.documents_needed,
            headline_task=headline.name,
            base=self._base,
            reference=tuple(name for side in references for name in side.names),
            candidate=candidate.names,
            hashes={
                "base": self._weights,
                "reference": [one for side in references for one in side.hashes],
                "candidate": list(candidate.hashes),
                "tasks": {task.name: task.fingerprint() for task in question.wanted},
                "tokenizer": tokenizer_digest(self.tokenizer),
            },
            environment={**environment(), "device": str(self.model.device)},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tasks=rows,
            policy_tolerance=question.policy_tolerance,
        )
        content = {key: value for key, value in certificate.to_dict().items() if key != "sha256"}
        return replace(certificate, sha256=digest(content))
