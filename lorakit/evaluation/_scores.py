"""One score a document, and what makes two sides comparable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import digest
from lorakit.statistics import Interval, jackknife_interval, seeds_interval
from lorakit.statistics import paired_interval as paired_interval
from lorakit.statistics._corpus import pseudo_values_of
from lorakit.statistics._corpus_metrics import corpus_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Scores(Report):
    """What one model scored on one task: a number for each document, higher is better.

    `documents` are the SHA-256 hashes of the documents with their prompts, in the order of `scores`. `settings` are
    what both sides of a comparison must share: prompt, decoding, few-shot examples, dtype, versions.

    A task with a corpus metric (`metric` is "mcc", "f1" or "macro_f1") has no score of a single document: `scores` are
    then the predicted classes, and `labels` the true ones.
    """

    task: str
    model: str
    documents: tuple[str, ...]
    scores: tuple[float, ...]
    settings: Mapping[str, Any]
    metric: str | None = None
    labels: tuple[float, ...] | None = None

    @property
    def mean(self) -> float:
        """The mean score, or the value of the corpus metric."""
        return mean_of(self.scores, self.metric, self.labels)

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


def mean_of(scores: Sequence[float], metric: str | None, labels: Sequence[float] | None) -> float:
    """The mean of scores, or a corpus metric of predicted classes and labels."""
    if metric is None:
        return math.fsum(scores) / len(scores)
    return float(corpus_metric(metric)(np.asarray(labels), np.asarray(scores)))


def scores_of(
    task: str,
    model: str,
    documents: Sequence[str],
    values: Sequence[float],
    settings: Mapping[str, Any],
    *,
    metric: str | None = None,
    labels: Sequence[float] | None = None,
) -> Scores:
    """Scores, checked; with a corpus metric, `values` are predicted classes.

    Raises: EvaluationError for no document, a score or label that is not finite, labels that are missing, or a document
        that is there twice.
    """
    if not documents:
        raise EvaluationError(f"Task {task!r} has no document.")
    if len(documents) != len(values):
        raise EvaluationError(f"Task {task!r} has {len(documents)} documents, but {len(values)} scores came.")
    if (metric is None) != (labels is None) or (labels is not None and len(labels) != len(values)):
        got = "none" if labels is None else len(labels)
        raise EvaluationError(
            f"Task {task!r} must have one label a document for a corpus metric, else none; got {got} for {len(values)} "
            f"documents and metric {metric!r}."
        )
    if not all(map(math.isfinite, labels or ())):
        raise EvaluationError(f"The labels of task {task!r} must be classes, as numbers; one is not finite.")
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
    kept = None if labels is None else tuple(map(float, labels))
    found = Scores(task, model, tuple(documents), tuple(map(float, values)), dict(settings), metric, kept)
    _ = found.mean  # a metric says which classes it is for
    return found


def read_scores(data: Mapping[str, Any]) -> Scores:
    """Scores from what their `to_dict` gave. Raises: KeyError, TypeError or EvaluationError for other data."""
    values = (data["task"], data["model"], data["documents"], data["scores"], data["settings"])
    return scores_of(*values, metric=data["metric"], labels=data["labels"])


def compare(
    reference: Scores, candidate: Scores, *, alpha: float = 0.05, groups: Sequence[Any] | None = None
) -> Interval:
    """The paired difference candidate − reference on the same documents, with one-sided bounds, each at `alpha`.

    A `PairedInterval`; of a task with a corpus metric a `CorpusInterval`.

    Args:
        reference, candidate: of the same task, documents and settings.
        alpha: the level of each bound.
        groups: which passage each document belongs to, where several share one; in the order of `reference`.
    Raises: EvaluationError where the two are not of the same task, prompts, decoding or dtype, or not on the same
        documents; and as `lorakit.statistics.paired_interval`.
    """
    values = aligned(reference, candidate)
    return interval_of([reference.scores], [values], alpha, groups, metric=reference.metric, labels=reference.labels)


def interval_of(
    reference: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    alpha: float,
    groups: Any = None,
    *,
    metric: str | None = None,
    labels: Sequence[float] | None = None,
) -> Interval:
    """The interval of one seed a side, or of several, paired by seed; of scores, or of classes with a corpus metric.

    Several seeds with a corpus metric: each seed's pseudo-values are its documents' differences.
    Raises: EvaluationError for two seeds, or different numbers of seeds on the two sides.
    """
    if len(reference) != len(candidate):
        raise EvaluationError(
            f"Both sides must have the same seeds; the reference has {len(reference)}, the candidate {len(candidate)}."
        )
    if metric is None:
        compute = paired_interval if len(reference) == 1 else seeds_interval
        pair = (reference[0], candidate[0]) if len(reference) == 1 else (reference, candidate)
        return compute(*pair, alpha=alpha, groups=groups)
    function = corpus_metric(metric)
    if len(reference) == 1:
        return jackknife_interval(function, labels, reference[0], candidate[0], alpha=alpha, groups=groups)
    values = [pseudo_values_of(function, labels, a, b)[0] for a, b in zip(reference, candidate, strict=True)]
    zero = np.full(
        np.shape(values), 0.5
    )  # other than 0, so that pseudo-values of 0 and 1 are no wrong and right answers
    return seeds_interval(zero, zero + np.asarray(values), alpha=alpha, groups=groups)


def aligned(reference: Scores, candidate: Scores) -> list[float]:
    """The candidate's scores in the order of the reference's documents. Raises: as `compare`."""
    if reference.task != candidate.task:
        raise EvaluationError(f"The two sides are of different tasks: {reference.task!r} and {candidate.task!r}.")
    if reference.metric != candidate.metric:
        raise EvaluationError(
            f"The two sides have different metrics of {reference.task!r}: {reference.metric} and {candidate.metric}."
        )
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
    if reference.labels is not None and candidate.labels is not None:
        labels = dict(zip(candidate.documents, candidate.labels, strict=True))
        if any(labels[d] != label for d, label in zip(reference.documents, reference.labels, strict=True)):
            raise EvaluationError(f"The two sides have different labels of {reference.task!r}. Evaluate both again.")
    return [scores[document] for document in reference.documents]
