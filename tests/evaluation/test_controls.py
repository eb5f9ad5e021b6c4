"""The machinery's own controls (METHODS section 7) that need no model, or one model for all of them.

Those that score an adapter are in `test_certify`: a reference against itself, another batch size, a damaged adapter, too
few documents, documents that were used before.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lorakit import evaluation
from lorakit.errors import EvaluationError
from lorakit.evaluation._certified_task import evidence_of
from lorakit.evaluation._digests import digest
from lorakit.evaluation._scores import scores_of
from lorakit.statistics import jackknife_interval, paired_interval, seeds_interval
from lorakit.statistics._corpus_metrics import corpus_metric

RNG = np.random.default_rng(0)


def scores(values, name="task", model="a", **more):
    documents = [digest([name, i]) for i in range(len(values))]
    return scores_of(name, model, documents, values, {"dtype": "float32"}, **more)


def certificate(reference, candidate, *, margin=0.05, alpha=0.05, tolerance=None, groups=None):
    """A certificate of one task, from seeds of either side, without models."""
    evidence = evidence_of(reference, candidate, name=reference[0].task, margin=margin, alpha=alpha, groups=groups)
    row = evidence.certified(alpha, tolerance)
    found = evaluation.Certificate(
        verdict=row.verdict,
        alpha=alpha,
        margin=row.margin,
        difference=row.difference,
        lower=row.lower,
        upper=row.upper,
        documents_needed=row.documents_needed,
        headline_task=row.name,
        base="base",
        reference=("a",) * len(reference),
        candidate=("b",) * len(candidate),
        hashes={"base": "0" * 64, "candidate": ["1" * 64]},
        environment={"torch": "2"},
        created="2026-01-01T00:00:00+00:00",
        tasks=(row,),
        policy_tolerance=tolerance,
    )
    return replace(found, sha256=digest({k: v for k, v in found.to_dict().items() if k != "sha256"}))


@pytest.mark.slow
def test_no_byte_of_a_certificate_can_change(tmp_path):
    values = [0.5, 1.25, -0.75, 0.1, 0.3]
    one = certificate([scores(values)], [scores([v - 0.01 * i for i, v in enumerate(values)])], groups=list("aabbc"))
    path = tmp_path / "certificate.json"
    one.save(path)
    content = path.read_bytes()
    evaluation.read_certificate(path).verify()
    assert evaluation.read_certificate(path) == one
    replacements = {b: bytes([c]) for b, c in zip(b" \n0123456789", b"\n\t1234567890", strict=True)}
    for i in range(len(content)):
        for other in (replacements.get(content[i], b"x"), bytes([content[i] ^ 1])):
            path.write_bytes(content[:i] + other + content[i + 1 :])
            with pytest.raises(EvaluationError, match=r"does not verify|is not a certificate"):
                evaluation.read_certificate(path).verify()
    for changed in (content + b"\n", content[:-1], b"", b"[]", b'{"format": 1}'):
        path.write_bytes(changed)
        with pytest.raises(EvaluationError, match="is not a certificate"):
            evaluation.read_certificate(path)


@pytest.mark.parametrize("field", ["labels", "metric", "within_policy", "mcnemar_p_value", "policy_tolerance"])
def test_forged_figures_do_not_verify(field):
    seeds = [scores(np.eye(12)[i] + 0.25) for i in range(3)]
    one = certificate(seeds, [replace(s, scores=tuple(v - 0.01 for v in s.scores)) for s in seeds], tolerance=0.025)
    if field in ("labels", "metric"):
        labels = [float(i % 2) for i in range(12)]
        pair = [scores(labels, metric="mcc", labels=labels), scores(labels[::-1], metric="mcc", labels=labels)]
        one = certificate(pair[:1], pair[1:])
    one.verify()
    [row] = one.tasks
    forged = {
        "labels": {"labels": tuple(1 - label for label in row.labels or ())},
        "metric": {"metric": "f1"},
        "within_policy": {"within_policy": not row.within_policy},
        "mcnemar_p_value": {"mcnemar_p_value": 0.5},
    }
    if field == "policy_tolerance":
        other = replace(one, policy_tolerance=1e-6)
    else:
        other = replace(one, tasks=(replace(row, **forged[field]),))
    other = replace(other, sha256=digest({k: v for k, v in other.to_dict().items() if k != "sha256"}))
    with pytest.raises(EvaluationError, match="does not verify"):
        other.verify()


@pytest.mark.parametrize("metric", ["mcc", "macro_f1"])
def test_a_corpus_metric_is_certified_by_pseudo_values(metric):
    labels = RNG.integers(0, 3, 90).astype(float)
    reference = np.where(RNG.random(90) < 0.85, labels, 0.0)
    candidate = np.where(RNG.random(90) < 0.6, labels, 0.0)
    sides = [scores(side.tolist(), metric=metric, labels=labels.tolist()) for side in (reference, candidate)]
    one = certificate(sides[:1], sides[1:], margin=0.02)
    expected = jackknife_interval(corpus_metric(metric), labels, reference, candidate)
    [row] = one.tasks
    assert (row.difference, row.lower, row.upper) == (expected.difference, expected.lower, expected.upper)
    assert row.reference_mean == corpus_metric(metric)(labels, reference)
    assert (row.method, row.metric, one.verdict) == ("jackknife-t", metric, "FAIL")
    interval = evaluation.compare(*sides)
    assert interval == expected
    # The jackknife written out.
    whole = corpus_metric(metric)(labels, candidate) - corpus_metric(metric)(labels, reference)
    keep = [np.arange(90) != j for j in range(90)]
    without = [
        corpus_metric(metric)(labels[k], candidate[k]) - corpus_metric(metric)(labels[k], reference[k]) for k in keep
    ]
    pseudo = 90 * whole - 89 * np.array(without)
    reach = stats.t.ppf(0.95, 89) * pseudo.std(ddof=1) / math.sqrt(90)
    assert row.lower == pytest.approx(pseudo.mean() - reach, abs=1e-12)
    same = certificate(sides[:1], sides[:1])
    assert (same.difference, same.lower, same.verdict) == (0.0, 0.0, "PASS")


def test_seeds_of_a_corpus_metric_have_their_pseudo_values_as_documents():
    labels = RNG.integers(0, 2, 40).astype(float)
    reference, candidate = ([np.where(RNG.random(40) < p, labels, 1 - labels) for _ in range(3)] for p in (0.9, 0.8))
    sides = [
        [scores(s.tolist(), metric="mcc", labels=labels.tolist()) for s in side] for side in (reference, candidate)
    ]
    [row] = certificate(*sides, tolerance=0.025).tasks
    mcc = corpus_metric("mcc")
    pseudo = []
    for a, b in zip(reference, candidate, strict=True):
        keep = [np.arange(40) != j for j in range(40)]
        without = np.array([mcc(labels[k], b[k]) - mcc(labels[k], a[k]) for k in keep])
        pseudo.append(40 * (mcc(labels, b) - mcc(labels, a)) - 39 * without)
    expected = seeds_interval(np.full((3, 40), 0.3), 0.3 + np.array(pseudo))
    assert (row.difference, row.lower) == pytest.approx((expected.difference, expected.lower), abs=1e-12)
    assert row.worst_seed_difference == pytest.approx(min(p.mean() for p in pseudo), abs=1e-12)


def test_gradience_s_policy_is_reported_and_decides_nothing():
    base = RNG.normal(size=200)
    reference = [scores(base + 0.001 * s) for s in range(3)]
    drops = (0.0, 0.01, 0.03)
    candidate = [scores(base + 0.001 * s - drop) for s, drop in enumerate(drops)]
    one = certificate(reference, candidate, margin=1.0, tolerance=0.025)
    [row] = one.tasks
    assert row.worst_seed_difference == pytest.approx(-0.03)
    assert (row.within_policy, one.verdict) == (False, "PASS")
    assert "worst seed -0.0300 (outside the policy)" in one.details[0]
    assert certificate(reference, candidate, margin=1.0, tolerance=0.05).tasks[0].within_policy is True
    assert certificate(reference, candidate, margin=1.0).tasks[0].within_policy is None


def test_mcnemar_stands_beside_tango():
    reference = [1.0] * 80 + [0.0] * 20
    candidate = [1.0] * 70 + [0.0] * 29 + [1.0]
    [row] = certificate([scores(reference)], [scores(candidate)]).tasks
    assert (row.reference_only, row.candidate_only) == (10, 1)
    assert row.mcnemar_p_value == pytest.approx(stats.binomtest(1, 11).pvalue)
    assert row.lower == paired_interval(reference, candidate).lower
    assert "10 right before only, 1 after only (McNemar p = 0.012)" in row.line


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"values": [0.0, 1.0, math.nan]}, "not finite on 1 of 3 documents"),
        (
            {"values": [0.0, 1.0, 1.0], "settings": {"dtype": "bfloat16"}},
            "dtype is 'float32' for a and 'bfloat16' for b",
        ),
        ({"values": [0.0, 1.0], "documents": 2}, "lacks 1 and has 0 others"),
        ({"values": [0.0, 1.0, 1.0], "documents": "other prompts"}, "lacks 3 and has 3 others"),
        ({"values": [0.0, 1.0, 1.0], "documents": "twice"}, "one document more than once"),
        (
            {"values": [0.0, 1.0, 1.0], "metric": "mcc", "labels": [0, 1, 1]},
            "different metrics of 'task': None and mcc",
        ),
        ({"values": [0.0, 1.0, 1.0], "metric": "mcc"}, "one label a document for a corpus metric, else none; got none"),
        ({"values": [0.0, 1.0, 1.0], "metric": "mcc", "labels": [0, 1, math.nan]}, "must be classes, as numbers"),
    ],
)
def test_sides_that_are_refused(candidate, message):
    def side(values, documents=3, settings=None, **more):
        names = [digest(["task", i]) for i in range(3)]
        names = {"other prompts": [n[::-1] for n in names], "twice": names[:2] + names[:1]}.get(documents) or names[
            :documents
        ]
        return scores_of("task", "b", names, values, settings or {"dtype": "float32"}, **more)

    with pytest.raises(EvaluationError, match=message):
        evaluation.compare(scores([0.0, 1.0, 1.0]), side(**candidate))


def test_labels_of_the_two_sides_must_be_the_same():
    a, b = (scores([0.0, 1.0, 1.0], metric="mcc", labels=labels) for labels in ([0, 1, 1], [0, 0, 1]))
    with pytest.raises(EvaluationError, match="different labels of 'task'"):
        evaluation.compare(a, b)
