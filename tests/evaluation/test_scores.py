"""What is comparable, and what is refused."""

from __future__ import annotations

import pytest

from lorakit.errors import EvaluationError
from lorakit.evaluation import Scores, compare
from lorakit.evaluation._scores import scores_of
from lorakit.statistics import paired_interval

DOCUMENTS = [f"{i:064x}" for i in range(40)]


def make(values, documents=DOCUMENTS, task="arc", model="a", **settings):
    return scores_of(task, model, documents, values, {"dtype": "float32", **settings})


def test_a_comparison_is_the_paired_interval_of_aligned_documents():
    reference = make([i % 2 for i in range(40)])
    shuffled = list(reversed(DOCUMENTS))
    values = {document: float(i % 3 == 0) for i, document in enumerate(DOCUMENTS)}
    candidate = make([values[d] for d in shuffled], shuffled, model="b")
    expected = paired_interval(reference.scores, [values[d] for d in DOCUMENTS])
    assert compare(reference, candidate) == expected
    assert isinstance(reference, Scores)
    assert reference.mean == 0.5
    assert "0.5000 over 40 documents" in repr(reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "piqa"}, "of different tasks: 'arc' and 'piqa'"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' for a and 'bfloat16' for b"),
        ({"prompt": "Q: "}, "prompt is None for a and 'Q: ' for b"),
        ({"documents": [*DOCUMENTS[:39], "f" * 64]}, "b lacks 1 and has 1 others"),
    ],
)
def test_sides_that_cannot_be_compared(change, message):
    other = {"values": [1.0] * 40, "model": "b"} | change
    with pytest.raises(EvaluationError, match=message):
        compare(make([0.0] * 40), make(**other))


@pytest.mark.parametrize(
    ("values", "documents", "message"),
    [
        ([0.0, float("nan")], DOCUMENTS[:2], r"not finite on 1 of 2 documents of task 'arc' \(document 1: nan\)"),
        ([0.0, 1.0], [DOCUMENTS[0]] * 2, r"more than once \(documents 0 and 1\)"),
        ([], [], "has no document"),
        ([1.0], DOCUMENTS[:2], "has 2 documents, but 1 scores came"),
    ],
)
def test_scores_that_are_refused(values, documents, message):
    with pytest.raises(EvaluationError, match=message):
        make(values, documents)
