"""Corpus metrics against scikit-learn's and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorakit.errors import EvaluationError
from lorakit.statistics._corpus_metrics import CORPUS_METRICS, corpus_metric

metrics = pytest.importorskip("sklearn.metrics")

REFERENCES = {
    "mcc": metrics.matthews_corrcoef,
    "f1": lambda y, p: metrics.f1_score(y, p, zero_division=0),
    "pearson": lambda y, p: stats.pearsonr(y, p).statistic if np.ptp(y) and np.ptp(p) else 0.0,
    "macro_f1": lambda y, p: metrics.f1_score(y, p, average="macro", zero_division=0),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("name", CORPUS_METRICS)
@given(data=st.data())
def test_they_are_scikit_learn_s(name, data):
    classes = st.integers(0, 1 if name == "f1" else 4)
    n = data.draw(st.integers(1, 30))
    y, p = (np.array(data.draw(st.lists(classes, min_size=n, max_size=n)), dtype=float) for _ in range(2))
    assert corpus_metric(name)(y, p) == pytest.approx(REFERENCES[name](y, p), abs=1e-12)


def test_what_is_refused():
    with pytest.raises(EvaluationError, match=r"must be one of mcc, f1, macro_f1, pearson; got 'bleu'"):
        corpus_metric("bleu")
    with pytest.raises(EvaluationError, match=r'"f1" is for the classes 0 and 1; got 2. Use "macro_f1"'):
        corpus_metric("f1")(np.array([0.0, 2.0]), np.array([0.0, 1.0]))
