"""What a verdict rests on: a hypothesis that is fixed beforehand, and two scored sides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lorakit._checks import check_number
from lorakit.errors import EvaluationError
from lorakit.evaluation._attach import adapted
from lorakit.evaluation._certificate import Certificate, CertifiedTask
from lorakit.evaluation._digests import adapter_digest, base_digest, digest
from lorakit.evaluation._evaluate import environment, scored, tasks_of
from lorakit.evaluation._models import LoadOptions, label_of, load_base, load_tokenizer
from lorakit.evaluation._scores import Scores
from lorakit.evaluation._tasks import Task
from lorakit.statistics import combine_tasks


@dataclass(frozen=True)
class Side:
    """The reference or the candidate: for each seed a name, a hash and its scores by task."""

    names: tuple[str, ...]
    hashes: tuple[str, ...]
    scores: tuple[dict[str, Scores], ...]


@dataclass(frozen=True)
class Hypothesis:
    """Tasks, margins and alpha, fixed before the first score is computed."""

    tasks: tuple[Task, ...]
    guards: frozenset[str]
    margin: float
    margins: Mapping[str, float]
    alpha: float
    groups: Mapping[str, Sequence[Any]]

    @classmethod
    def of(
        cls, tasks: Any, guards: Any, *, margin: float, alpha: float, groups: Mapping[str, Sequence[Any]] | None = None
    ) -> Hypothesis:
        """The arguments of `certify`, checked. Raises: EvaluationError, ValueError, TypeError."""
        guarded = tasks_of(guards) if guards else []
        everything = tasks_of([*tasks_of(tasks), *guarded])
        check_number("margin", margin, above=0)
        if check_number("alpha", alpha, above=0, most=0.5) >= 0.5:
            raise EvaluationError(f"`alpha` must be below 0.5; got {alpha!r}.")
        names = [task.name for task in everything]
        unknown = [name for name in groups or {} if name not in names]
        if unknown:
            raise EvaluationError(f"`groups` names {unknown[0]!r}, which is no task; the tasks are {names}.")
        margins = {task.name: margin if task.margin is None else task.margin for task in everything}
        guard_names = frozenset(task.name for task in guarded)
        return cls(tuple(everything), guard_names, margin, margins, alpha, groups or {})

    def results(self, reference: Side, candidate: Side) -> tuple[CertifiedTask, ...]:
        """Each task's result, with its verdict among all of them."""
        rows = [
            CertifiedTask.of(
                [scores[task.name] for scores in reference.scores],
                [scores[task.name] for scores in candidate.scores],
                margin=self.margins[task.name],
                alpha=self.alpha,
                groups=self.groups.get(task.name),
                guard=task.name in self.guards,
            )
            for task in self.tasks
        ]
        verdicts = combine_tasks({row.name: row.interval(self.alpha) for row in rows}, self.margins).verdicts
        return tuple(replace(row, verdict=verdicts[row.name]) for row in rows)


@dataclass(frozen=True)
class Settings:
    """How many documents are scored, where results are kept, and which documents are refused."""

    limit: int | None = None
    used_documents: frozenset[str] = frozenset()
    cache: str | os.PathLike[str] | None = None
    progress: bool = True


class Comparison:
    """A base model on which adapters are scored and compared under one hypothesis.

    `reference` is the adapter whose tokenizer and chat template both sides use, unless `tokenizer` is given.
    """

    def __init__(
        self,
        base: Any,
        hypothesis: Hypothesis,
        settings: Settings,
        *,
        tokenizer: Any = None,
        reference: Any = None,
        options: LoadOptions | None = None,
    ) -> None:
        self.hypothesis = hypothesis
        self._settings = settings
        self._base = label_of(base)
        self._model = load_base(base, options)
        self._tokenizer = load_tokenizer(base, reference, options) if tokenizer is None else tokenizer
        self._weights = base_digest(self._model)

    def score(self, adapters: Sequence[Any], names: Sequence[str] | None = None) -> Side:
        """The seeds of one side, scored on every task; `names` are what reports call them.

        Raises: EvaluationError for adapters that do not fit, are of another base model or are not applied, documents
            that were used before, and scores that are not finite.
        """
        names = [label_of(adapter) for adapter in adapters] if names is None else names
        hashes, found = [], []
        for name, adapter in zip(names, adapters, strict=True):
            hashes.append(adapter_digest(adapter))
            weights = digest([self._weights, hashes[-1]])
            with adapted(self._model, adapter) as model:
                if model is adapter and base_digest(model) != self._weights:
                    raise EvaluationError(
                        f"The adapter in {name!r} is on a base model with other weights than {self._base!r}."
                    )
                scores = scored(
                    model,
                    self.hypothesis.tasks,
                    self._tokenizer,
                    limit=self._settings.limit,
                    cache=self._settings.cache,
                    weights=weights,
                    progress=self._settings.progress,
                )
            self._refuse_used(scores)
            found.append({task: replace(one, model=name) for task, one in scores.items()})
        return Side(tuple(names), tuple(hashes), tuple(found))

    def _refuse_used(self, scores: Mapping[str, Scores]) -> None:
        for name, one in scores.items():
            again = self._settings.used_documents.intersection(one.documents)
            if again:
                raise EvaluationError(
                    f"{len(again)} documents of task {name!r} were used for calibration or selection: a verdict on "
                    f"them would be too good. Take them out of the task."
                )

    def certificate(self, reference: Side, candidate: Side) -> Certificate:
        """The verdict on two scored sides, with hashes of all that it rests on."""
        rows = self.hypothesis.results(reference, candidate)
        intervals = {row.name: row.interval(self.hypothesis.alpha) for row in rows}
        combined = combine_tasks(intervals, self.hypothesis.margins)
        headline = next(row for row in rows if row.name == combined.headline)
        sides = {"reference": reference, "candidate": candidate}
        data = {task.name: task.fingerprint() for task in self.hypothesis.tasks}
        hashes = {"base": self._weights, "tasks": data, **{name: list(side.hashes) for name, side in sides.items()}}
        certificate = Certificate(
            verdict=combined.verdict,
            alpha=self.hypothesis.alpha,
            margin=headline.margin,
            difference=headline.difference,
            lower=headline.lower,
            upper=headline.upper,
            documents_needed=headline.documents_needed,
            headline_task=headline.name,
            base=self._base,
            reference=reference.names,
            candidate=candidate.names,
            hashes=hashes,
            environment={**environment(), "device": str(self._model.device)},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tasks=rows,
        )
        content = {key: value for key, value in certificate.to_dict().items() if key != "sha256"}
        return replace(certificate, sha256=digest(content))
