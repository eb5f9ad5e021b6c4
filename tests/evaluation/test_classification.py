"""Scores of models that classify, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from classified import sentences, write_bert, write_images, write_lines, write_vit
from datasets import Dataset
from numpy.testing import assert_allclose

from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions, classification, compare, evaluate
from lorakit.evaluation import _classification as module
from lorakit.evaluation._models import load_classifier

COLUMNS = {"text": "sentence", "label": "label"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    write_bert(path)
    return path


def model_of(path, seed=0, num_labels=2, task_type="SEQ_CLS"):
    torch.manual_seed(seed)
    model, _ = load_classifier(path, LoadOptions(device="cpu"), task_type=task_type, num_labels=num_labels)
    return model


@pytest.fixture
def spread(bert):
    """A model that predicts both classes."""
    from transformers import AutoTokenizer

    model = model_of(bert)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    texts = [row["sentence"] for row in sentences(30)]
    apart = np.diff(reference_logits(model, AutoTokenizer.from_pretrained(bert), texts)).ravel()
    with torch.no_grad():
        model.classifier.bias[1] -= float(np.median(apart))
    return model


def reference_logits(model, tokenizer, texts):
    """One document at a time, float64."""
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits[0].double().numpy() for text in texts]
    return np.stack(found)


def test_scores_are_those_of_each_document_alone(bert, spread):
    from transformers import AutoTokenizer

    rows = sentences(30)
    data = Dataset.from_list(rows)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tasks = [classification(data, name=metric, metric=metric, columns=COLUMNS, batch_size=4) for metric in METRICS]
    scores = evaluate(spread, tasks, tokenizer=tokenizer, progress=False)
    logits = reference_logits(spread, tokenizer, [row["sentence"] for row in rows])
    labels = np.array([row["label"] for row in rows])
    predicted = logits.argmax(1)
    assert set(predicted) == {0, 1}
    assert_allclose(scores["acc"].scores, predicted == labels)
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert_allclose(scores["loss"].scores, log_probability[np.arange(30), labels], rtol=1e-4, atol=1e-5)
    assert scores["mcc"].mean == pytest.approx(np.corrcoef(labels, predicted)[0, 1])
    assert scores["mcc"].scores == tuple(map(float, predicted))
    assert scores["mcc"].labels == tuple(map(float, labels))
    both = ((labels == 1) & (predicted == 1)).sum()
    assert scores["f1"].mean == pytest.approx(2 * both / (labels.sum() + predicted.sum()))


METRICS = ("acc", "mcc", "f1", "loss")


def test_a_models_number_is_scored_by_its_correlation_and_its_squared_error(bert):
    from transformers import AutoTokenizer

    rows = [{**row, "label": 0.3 * i} for i, row in enumerate(sentences(12))]
    data, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(bert)
    model = model_of(bert, num_labels=1)
    tasks = [classification(data, name=metric, metric=metric, columns=COLUMNS) for metric in ("pearson", "loss")]
    scores = evaluate(model, tasks, tokenizer=tokenizer, progress=False)
    numbers = reference_logits(model, tokenizer, [row["sentence"] for row in rows])[:, 0]
    labels = 0.3 * np.arange(12)
    predicted = scores["pearson"].scores  # they differ little, so that their correlation is less exact than they are
    assert_allclose(predicted, numbers, rtol=1e-4, atol=1e-5)
    assert scores["pearson"].mean == pytest.approx(np.corrcoef(labels, predicted)[0, 1], abs=1e-9)
    assert_allclose(scores["loss"].scores, -((numbers - labels) ** 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(EvaluationError, match="has the metric 'acc', and the model predicts a number"):
        evaluate(model, classification(data, columns=COLUMNS), tokenizer=tokenizer, progress=False)


def test_pearson_of_a_constant_is_zero(bert):
    from lorakit.statistics._corpus_metrics import corpus_metric

    assert corpus_metric("pearson")(np.array([1.0, 2.0]), np.array([3.0, 3.0])) == 0.0


def test_a_class_that_the_model_does_not_know_is_an_error(bert, spread):
    from transformers import AutoTokenizer

    data = Dataset.from_list([{"text": "w1", "label": 2}])
    with pytest.raises(EvaluationError, match="has the label 2, and the model knows 2 classes"):
        evaluate(spread, classification(data), tokenizer=AutoTokenizer.from_pretrained(bert), progress=False)


def test_copies_count_once_and_a_limit_takes_the_first(bert, spread, tmp_path):
    from transformers import AutoTokenizer

    rows = sentences(5)
    path = write_lines(tmp_path / "dev.jsonl", [*rows, rows[0]])
    task = classification(path, columns=COLUMNS)
    found = evaluate(spread, task, tokenizer=AutoTokenizer.from_pretrained(bert), progress=False)["dev"]
    assert (len(found.scores), found.settings["copies_left_out"]) == (5, 1)
    first = evaluate(spread, task, tokenizer=AutoTokenizer.from_pretrained(bert), limit=2, progress=False)["dev"]
    assert first.documents == found.documents[:2]


def test_two_models_are_compared_by_a_corpus_metric(bert, spread):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    task = classification(Dataset.from_list(sentences(40)), metric="mcc", columns=COLUMNS)
    other = model_of(bert, seed=3)
    with torch.no_grad():
        other.classifier.weight.mul_(50)
    one, two = (evaluate(model, task, tokenizer=tokenizer, progress=False)[task.name] for model in (spread, other))
    interval = compare(one, two)
    assert interval.candidate_metric - interval.reference_metric == pytest.approx(two.mean - one.mean)


def test_tasks_on_the_same_documents_share_one_pass_where_the_weights_are_fixed(bert, spread, monkeypatch):
    from transformers import AutoTokenizer

    calls = []
    real = module.class_logits
    monkeypatch.setattr(module, "class_logits", lambda *given: calls.append(1) or real(*given))
    data, tokenizer = Dataset.from_list(sentences(6)), AutoTokenizer.from_pretrained(bert)
    tasks = [classification(data, name=metric, metric=metric, columns=COLUMNS) for metric in ("acc", "loss")]
    with module.shared_logits():
        shared = evaluate(spread, tasks, tokenizer=tokenizer, progress=False)
    assert len(calls) == 1
    assert evaluate(spread, tasks, tokenizer=tokenizer, progress=False) == shared
    assert len(calls) == 3


def test_images_are_classified(tmp_path):
    from transformers import AutoImageProcessor

    write_vit(tmp_path / "vit")
    model = model_of(tmp_path / "vit", num_labels=2, task_type="IMAGE_CLS")
    task = classification(write_images(tmp_path / "images", 6), metric="loss", batch_size=4)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    scores = evaluate(model, task, tokenizer=processor, progress=False)["images loss"].scores
    data = task.read()
    with torch.no_grad():
        from lorakit.data._labelled import inputs_for

        inputs = inputs_for(data, processor, 1)
        batch = inputs.collate_fn([inputs.examples[i] for i in range(6)])
        logits = model(pixel_values=batch["pixel_values"]).logits.double().numpy()
    expected = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(6), list(data.labels)]
    assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_new_head_depends_on_the_seed_and_is_named(bert):
    torch.manual_seed(5)
    one, new = load_classifier(bert, LoadOptions(device="cpu"), task_type="SEQ_CLS", num_labels=3)
    assert new == ("classifier",)
    assert torch.equal(model_of(bert, 5, 3).classifier.weight, one.classifier.weight)
    assert not torch.equal(model_of(bert, 6, 3).classifier.weight, one.classifier.weight)


def test_a_fingerprint_depends_on_data_metric_length_and_columns(tmp_path):
    path = write_lines(tmp_path / "dev.jsonl", sentences(3))
    other = write_lines(tmp_path / "other.jsonl", sentences(4))
    tasks = [
        classification(path, columns=COLUMNS),
        classification(other, columns=COLUMNS),
        classification(path, columns=COLUMNS, metric="mcc"),
        classification(path, columns=COLUMNS, length=3),
        classification(path, columns=COLUMNS, start=1),
    ]
    assert len({task.fingerprint() for task in tasks}) == 5
    assert classification(path, columns=COLUMNS, margin=0.1).fingerprint() == tasks[0].fingerprint()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"path": "a.jsonl", "metric": "auc"},
            ValueError,
            "`metric` must be one of acc, mcc, f1, macro_f1, pearson, loss",
        ),
        ({"path": [1, 2]}, TypeError, "`path` must be a path, a dataset id or a Dataset; got list"),
        ({"path": "a.jsonl", "lenght": 3}, TypeError, "`lenght` is no option of a classification"),
        ({"path": "a.jsonl", "length": 0}, ValueError, "`length` must be a positive integer; got 0"),
        ({"path": "a.jsonl", "margin": -1}, ValueError, "`margin` must be"),
    ],
)
def test_arguments_that_are_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        classification(**arguments)


def test_a_model_without_a_tokenizer_says_so(spread):
    task = classification(Dataset.from_list(sentences(2)), columns=COLUMNS)
    with pytest.raises(EvaluationError, match="needs the model's tokenizer or processor"):
        task.score(spread, None, limit=None, progress=False)
