"""Metrics of a whole corpus, such as Matthews' correlation or F1: no document has a score of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import EvaluationError
from lorakit.statistics._inputs import Floats, as_alpha, as_groups
from lorakit.statistics._interval import Interval, mean_and_error, t_bounds

CorpusMetric = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True, kw_only=True)
class CorpusInterval(Interval):
    """The difference of two models in a corpus metric.

    `difference` is the mean of the jackknife's pseudo-values: candidate_metric − reference_metric, less the jackknife's
    estimate of its bias. `method` is "jackknife-t" or "cluster-jackknife-t".
    """

    reference_metric: float
    candidate_metric: float
    num_groups: int | None


def jackknife_interval(
    metric: CorpusMetric,
    labels: Any,
    reference_predictions: Any,
    candidate_predictions: Any,
    *,
    alpha: float = 0.05,
    groups: Any = None,
) -> CorpusInterval:
    """Difference candidate − reference in a corpus metric, with one-sided t bounds, each at level `alpha`.

    Each document j is left out of both sides in turn. The pseudo-values n·Δ − (n − 1)·Δ_(−j) are then treated as
    scores of documents: t bounds, or cluster t bounds with `groups`. For a metric that is a mean over documents this
    is the t interval of `paired_interval`. The metric is called 2(n + 1) times, and must be smooth in the documents: a
    median or a maximum is not.

    Args:
        metric: metric(labels, predictions) → float, higher is better; gets arrays of n or n − 1 documents.
        labels, reference_predictions, candidate_predictions: arrays whose first dimension is the n >= 2 documents.
        alpha: in (0, 0.5]. groups: (n,), the label of each document's group, or None.

    Raises: EvaluationError for different numbers of documents, fewer than 2, a metric that is not a finite number on
    all documents or with one left out, alpha outside (0, 0.5], or groups that do not fit. What `metric` raises passes.
    Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11.

    Example:
        >>> import numpy as np
        >>> def matthews(labels, predictions):
        ...     return float(np.corrcoef(labels, predictions)[0, 1])
        >>> labels, reference = [0, 1] * 20, [0, 1] * 18 + [1, 0] * 2
        >>> interval = jackknife_interval(matthews, labels, reference, [1] + reference[1:])
        >>> round(interval.candidate_metric - interval.reference_metric, 3), round(interval.lower, 3)
        (-0.049, -0.132)
    """
    alpha = as_alpha(alpha)
    pseudo_values, whole = pseudo_values_of(metric, labels, reference_predictions, candidate_predictions)
    n = pseudo_values.size
    codes = None if groups is None else as_groups(groups, n)
    difference, error, degrees = mean_and_error(pseudo_values, codes)
    lower, upper = t_bounds(difference, error, degrees, alpha)
    return CorpusInterval(
        difference=difference,
        lower=lower,
        upper=upper,
        alpha=alpha,
        n=n,
        method="jackknife-t" if codes is None else "cluster-jackknife-t",
        standard_error=error,
        degrees_of_freedom=degrees,
        reference_metric=whole[0],
        candidate_metric=whole[1],
        num_groups=None if codes is None else degrees + 1,
    )


def pseudo_values_of(
    metric: CorpusMetric, labels: Any, reference_predictions: Any, candidate_predictions: Any
) -> tuple[Floats, tuple[float, float]]:
    """The pseudo-values (n,) of the difference, and the metrics of reference and candidate on all documents.

    Arguments and errors as in `jackknife_interval`.
    """
    y = _as_documents("labels", labels)
    reference = _as_documents("reference_predictions", reference_predictions)
    candidate = _as_documents("candidate_predictions", candidate_predictions)
    n = len(y)
    if not n == len(reference) == len(candidate) or n < 2:
        raise EvaluationError(
            "`labels`, `reference_predictions` and `candidate_predictions` must have the same documents, at least 2; "
            f"got {n}, {len(reference)} and {len(candidate)}."
        )
    whole = (_value(metric, y, reference, "reference"), _value(metric, y, candidate, "candidate"))
    total = whole[1] - whole[0]
    pseudo_values: Floats = np.empty(n)
    for j in range(n):
        rest = np.arange(n) != j
        without = f"with document {j} left out"
        reference_value = _value(metric, y[rest], reference[rest], "reference", without)
        candidate_value = _value(metric, y[rest], candidate[rest], "candidate", without)
        pseudo_values[j] = total + (n - 1) * (total - (candidate_value - reference_value))
    return pseudo_values, whole


def _as_documents(name: str, values: Any) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise EvaluationError(f"`{name}` must be an array with a row a document: {error}") from error
    if array.ndim == 0:
        raise EvaluationError(f"`{name}` must be an array with a row a document; got {type(values).__name__}.")
    return array


def _value(
    metric: CorpusMetric, labels: NDArray[Any], predictions: NDArray[Any], side: str, where: str = "on all documents"
) -> float:
    value = metric(labels, predictions)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"`metric` must return a number; got {type(value).__name__}.") from error
    if not math.isfinite(number):
        raise EvaluationError(
            f"`metric` must be finite; got {number} for the {side} {where}. Define it where it is 0/0 (as 0, say), or "
            "use more documents."
        )
    return number
