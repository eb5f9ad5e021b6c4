"""One score a document, and what makes two sides comparable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import digest
from lorakit.statistics import PairedInterval
from lorakit.statistics import paired_interval as paired_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Scores(Report):
    """What one model scored on one task: a number for each document, higher is better.

    `documents` are the SHA-256 hashes of the documents with their prompts, in the order of `scores`. `settings` are
    what both sides of a comparison must share: prompt, decoding, few-shot examples, dtype, versions.
    """

    task: str
    model: str
    documents: tuple[str, ...]
    scores: tuple[float, ...]
    settings: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """The mean score."""
        return math.fsum(self.scores) / len(self.scores)

    @property
    def headline(self) -> str:
        """The mean score, in a line."""
        return f"{self.model} on {self.task}: {self.mean:.4f} over {len(self.scores)} documents."

    def rows(self) -> list[dict[str, Any]]:
        """One row a document."""
        return [{"document": d, "score": s} for d, s in zip(self.documents, self.scores, strict=True)]

    def digest(self) -> str:
        """SHA-256 of the documents and their scores."""
        return digest([list(self.documents), list(self.scores)])

    def plot(self) -> Figure:
        """A histogram of the scores."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        axes.hist(self.scores, bins=20)
        axes.axvline(self.mean, color="gray", label=f"mean {self.mean:.3g}")
        axes.set(xlabel="score", ylabel="documents", title=escape_mathtext(f"{self.model} on {self.task}"))
        axes.legend()
        return figure


def scores_of(
    task: str, model: str, documents: Sequence[str], values: Sequence[float], settings: Mapping[str, Any]
) -> Scores:
    """Scores, checked.

    Raises: EvaluationError for no document, a score that is not finite, or a document that is there twice.
    """
    if not documents:
        raise EvaluationError(f"Task {task!r} has no document.")
    if len(documents) != len(values):
        raise EvaluationError(f"Task {task!r} has {len(documents)} documents, but {len(values)} scores came.")
    wrong = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if wrong:
        raise EvaluationError(
            f"{model} has a score that is not finite on {len(wrong)} of {len(values)} documents of task {task!r} "
            f"(document {wrong[0]}: {values[wrong[0]]}). Check the adapter's weights and the dtype."
        )
    if len(set(documents)) < len(documents):
        twice = next(d for d, count in Counter(documents).items() if count > 1)
        places = [i for i, d in enumerate(documents) if d == twice]
        raise EvaluationError(
            f"Task {task!r} has one document more than once (documents {places[0]} and {places[1]}), which an interval "
            f"would count as independent. Remove the copies."
        )
    return Scores(task, model, tuple(documents), tuple(float(value) for value in values), dict(settings))


def compare(
    reference: Scores, candidate: Scores, *, alpha: float = 0.05, groups: Sequence[Any] | None = None
) -> PairedInterval:
    """The paired difference candidate − reference on the same documents, with one-sided bounds, each at `alpha`.

    Args:
        reference, candidate: of the same task, documents and settings.
        alpha: the level of each bound.
        groups: which passage each document belongs to, where several share one; in the order of `reference`.
    Raises: EvaluationError where the two are not of the same task, prompts, decoding or dtype, or not on the same
        documents; and as `lorakit.statistics.paired_interval`.
    """
    return paired_interval(reference.scores, aligned(reference, candidate), alpha=alpha, groups=groups)


def aligned(reference: Scores, candidate: Scores) -> list[float]:
    """The candidate's scores in the order of the reference's documents. Raises: as `compare`."""
    if reference.task != candidate.task:
        raise EvaluationError(f"The two sides are of different tasks: {reference.task!r} and {candidate.task!r}.")
    keys = sorted(set(reference.settings) | set(candidate.settings))
    for key in keys:
        ours, theirs = reference.settings.get(key), candidate.settings.get(key)
        if ours != theirs:
            raise EvaluationError(
                f"The two sides were evaluated differently on {reference.task!r}: {key} is {ours!r} for "
                f"{reference.model} and {theirs!r} for {candidate.model}. Evaluate both in the same way."
            )
    scores = dict(zip(candidate.documents, candidate.scores, strict=True))
    missing = [document for document in reference.documents if document not in scores]
    if missing or len(scores) != len(reference.documents):
        more = len(scores) - (len(reference.documents) - len(missing))
        raise EvaluationError(
            f"The two sides must have the same documents of {reference.task!r}: {candidate.model} lacks {len(missing)} "
            f"and has {more} others."
        )
    return [scores[document] for document in reference.documents]
