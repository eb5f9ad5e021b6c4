"""What tasks, models and tokenizers are taken, what is refused, and what is printed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit import evaluation
from lorakit.errors import EvaluationError
from lorakit.statistics._corpus_metrics import corpus_metric


def evaluated(home, task, **options):
    settings = {"progress": False} | options
    found = evaluation.evaluate_adapters(home / "base", [home / "good"], task, **settings)
    return next(iter(found[str(home / "good")].values()))


@pytest.mark.slow
def test_choices_with_a_corpus_metric_are_the_classes_that_the_accuracy_counts(home, questions):
    right = evaluated(home, evaluation.choices(questions, limit=40))
    classes = evaluated(home, evaluation.choices(questions, limit=40, metric="mcc"))
    assert classes.labels == tuple(float(i % 4) for i in range(40))
    pairs = zip(classes.labels, classes.scores, strict=True)
    assert [float(label == predicted) for label, predicted in pairs] == list(right.scores)
    assert classes.mean == corpus_metric("mcc")(torch.tensor(classes.labels), torch.tensor(classes.scores))
    assert classes.documents == right.documents
    same = evaluation.certify(
        home / "base",
        home / "good",
        home / "same",
        tasks=evaluation.choices(questions, limit=40, metric="macro_f1"),
        margin=0.05,
        progress=False,
    )
    assert (same.difference, same.tasks[0].metric, same.verdict) == (0.0, "macro_f1", "PASS")
    same.verify()
    with pytest.raises(ValueError, match="`metric` must be one of acc, acc_norm, mcc, f1, macro_f1; got 'bleu'"):
        evaluation.choices(questions, metric="bleu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["choices", "exact_match"])
def test_the_harness_shows_no_bars_without_progress_and_prints_nothing_on_stdout(
    home, questions, tmp_path, capfd, kind
):
    (tmp_path / "say.jsonl").write_text(
        "\n".join(json.dumps({"question": f"say {i}", "answer": "x"}) for i in range(4))
    )
    task = evaluation.choices(questions, limit=6)
    if kind == "exact_match":
        task = evaluation.exact_match(tmp_path / "say.jsonl", max_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    capfd.readouterr()
    evaluation.evaluate(model, task, tokenizer=tokenizer, progress=False)
    out, err = capfd.readouterr()
    assert (out, "it/s" in err, "requests" in err) == ("", False, False), err
    evaluation.evaluate(model, task, tokenizer=tokenizer, progress=True)
    out, err = capfd.readouterr()
    assert (out, "requests" in err) == ("", True)


def test_a_function_with_a_corpus_metric(home):
    labels = [float(i % 2) for i in range(30)]
    task = evaluation.function(lambda model: (labels, [1 - labels[0], *labels[1:]]), name="classes", metric="f1")
    found = evaluated(home, task)
    assert (found.metric, found.mean) == ("f1", 30 / 31)
    assert "0.9677" in found.headline
    with pytest.raises(
        EvaluationError, match=r"'classes' must return \(labels, predictions\) for the metric 'f1'; got list"
    ):
        evaluated(home, evaluation.function(lambda model: labels, name="classes", metric="f1"))
    with pytest.raises(EvaluationError, match="must be one of mcc, f1, macro_f1, pearson; got 'accuracy'"):
        evaluation.function(lambda model: labels, metric="accuracy")


def test_the_results_of_functions_are_never_kept(home, tmp_path):
    calls = []

    def count(model):
        calls.append(model)
        return [0.5, 1.5]

    for _ in range(2):
        evaluated(home, evaluation.function(count), cache=tmp_path / "cache")
    assert len(calls) == 2
    assert not list((tmp_path / "cache").glob("*"))


def test_limit(home, texts):
    assert len(evaluated(home, evaluation.loss(texts), limit=3).scores) == 3
    for limit in (0, -2, 1.5, True):
        with pytest.raises(ValueError, match="`limit` must be a positive integer; got"):
            evaluated(home, evaluation.loss(texts), limit=limit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "device": "cpu"}, "`load_in_4bit` needs an accelerator"),
        ({"device": "cuda:7"}, "`device` must be there; got 'cuda:7', and torch finds"),
    ],
)
def test_a_device_that_is_not_there(home, options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluation.load_base(home / "base", evaluation.LoadOptions(**options))


def test_documents_have_the_hashes_of_their_tasks(home, texts):
    assert evaluation.document_hashes(texts) == list(evaluated(home, evaluation.loss(texts)).documents)


@pytest.mark.slow
def test_agreement_needs_one_tokenization(home, tmp_path):
    shutil.copytree(home / "same", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    tokenizer.save_pretrained(tmp_path / "other")
    settings = {"progress": False, "length": 32}
    prompts = ["one prompt", "another"]
    found = evaluation.agreement(home / "base", home / "good", tmp_path / "other", prompts, **settings)
    assert found.kl.mean == 0.0
    tokenizer.eos_token = "z"
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(EvaluationError, match=r"of '.*good' and '.*other' make different tokens of the prompts"):
        evaluation.agreement(home / "base", home / "good", tmp_path / "other", prompts, **settings)
    evaluation.agreement(home / "base", home / "good", tmp_path / "other", prompts, tokenizer=tokenizer, **settings)


def test_the_fit_is_what_peft_loads(home, tmp_path):
    """Names that the base model has changed since the adapter was saved are PEFT's to convert."""
    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(adapter)
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    old = {key.replace("model.model.layers", "model.old.layers"): value for key, value in tensors.items()}
    save_file(old, adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    with pytest.raises(
        EvaluationError, match=r"adapter' does not fit .*base': it adapts 'old.layers.0.self_attn.q_proj'"
    ):
        evaluation._attach.AttachedAdapter(base, adapter)
    assert not any("lora" in name for name, _ in base.named_parameters())
    base._checkpoint_conversion_mapping = {r"^old\.": "model."}
    with evaluation._attach.adapted(base, adapter) as model:
        loaded = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert loaded
    assert all(torch.equal(v, tensors[k.replace(".default", "")]) for k, v in loaded.items())


def test_a_function_s_fingerprint_is_the_same_in_every_process():
    class Scorer:
        def __call__(self, model):
            return torch.zeros(1)

    def fingerprint(function, name="task"):
        return evaluation.function(function, name=name).fingerprint()

    assert fingerprint(Scorer()) == fingerprint(Scorer())  # no address in memory
    assert fingerprint(Scorer()) != fingerprint(Scorer(), "other")
    assert fingerprint(Scorer()) != fingerprint(lambda model: torch.zeros(1))
