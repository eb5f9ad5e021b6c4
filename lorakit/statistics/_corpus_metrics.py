"""Corpus metrics by name, of predicted and true classes, or of numbers. Higher is better; 0/0 is 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import EvaluationError
from lorakit.statistics._corpus import CorpusMetric

Classes = NDArray[Any]


def matthews(labels: Classes, predictions: Classes) -> float:
    """Matthews' correlation coefficient, of two classes or more (Gorodkin's R_K).

    References: Matthews, Biochimica et Biophysica Acta 405, 1975; Gorodkin, Computational Biology and Chemistry 28,
    2004.
    """
    counts = _confusion(labels, predictions)
    n = counts.sum()
    true, predicted = counts.sum(1), counts.sum(0)
    covariance = n * np.trace(counts) - true @ predicted
    spread = (n * n - true @ true) * (n * n - predicted @ predicted)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def f1(labels: Classes, predictions: Classes) -> float:
    """F1 of class 1, of the classes 0 and 1: 2 TP / (2 TP + FP + FN).

    Raises: EvaluationError for other classes.
    """
    others = np.setdiff1d(np.concatenate([labels, predictions]), [0, 1])
    if others.size:
        raise EvaluationError(f'Metric "f1" is for the classes 0 and 1; got {others[0]:g}. Use "macro_f1" for more.')
    both = float(((labels == 1) & (predictions == 1)).sum())
    total = float((labels == 1).sum() + (predictions == 1).sum())
    return 2 * both / total if total > 0 else 0.0


def macro_f1(labels: Classes, predictions: Classes) -> float:
    """The mean of the classes' F1, over all classes that are true or predicted."""
    counts = _confusion(labels, predictions)
    totals = counts.sum(0) + counts.sum(1)
    return float(np.mean(2 * np.diag(counts) / totals))


def pearson(labels: Classes, predictions: Classes) -> float:
    """Pearson's correlation of numbers; 0 where one side is constant."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


CORPUS_METRICS: dict[str, CorpusMetric] = {"mcc": matthews, "f1": f1, "macro_f1": macro_f1, "pearson": pearson}


def corpus_metric(name: str) -> CorpusMetric:
    """The metric of this name. Raises: EvaluationError for another name."""
    if name not in CORPUS_METRICS:
        raise EvaluationError(f"A corpus metric must be one of {', '.join(CORPUS_METRICS)}; got {name!r}.")
    return CORPUS_METRICS[name]


def _confusion(labels: Classes, predictions: Classes) -> NDArray[np.float64]:
    """How many documents have each true class (rows) and each predicted one (columns)."""
    classes, codes = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    pairs = codes[: len(labels)] * len(classes) + codes[len(labels) :]
    counts = np.bincount(pairs, minlength=len(classes) ** 2)
    return counts.reshape(len(classes), len(classes)).astype(np.float64)
