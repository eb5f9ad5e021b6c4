"""Agreement of next tokens against KL divergences written out in float64."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit import evaluation
from lorakit.errors import EvaluationError
from lorakit.statistics import paired_interval

PROMPTS = [f"prompt {i} of this kind" + " and so on" * (i % 3) for i in range(12)]


def agreement(home, candidate, prompts=PROMPTS, **options):
    settings = {"progress": False} | options
    return evaluation.agreement(home / "base", home / "good", home / candidate, prompts, **settings)


@torch.no_grad()
def log_probabilities(home, name, text):
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    if name is not None:
        model = PeftModel.from_pretrained(model, home / name)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    return log_softmax(model.eval()(input_ids=ids).logits[0, :-1].double().numpy(), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5])
def test_kl_and_agreement_are_those_of_the_definition(home, batch_size):
    found = agreement(home, "bad", batch_size=batch_size)
    for i in (0, 5, 11):
        p = log_probabilities(home, "good", PROMPTS[i])
        row = found.documents[i]
        assert row.tokens == len(p)
        for other, kl, top1 in (("bad", row.kl, row.top1), (None, row.adapter_kl, row.adapter_top1)):
            q = log_probabilities(home, other, PROMPTS[i])
            assert kl == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)), rel=1e-4)
            assert top1 == np.mean(p.argmax(-1) == q.argmax(-1))
    expected = paired_interval([0.0] * 12, [row.kl for row in found.documents])
    assert (found.kl.mean, found.kl.lower, found.kl.upper) == pytest.approx(
        (expected.difference, max(expected.lower, 0), expected.upper)
    )
    shares = paired_interval([0.0] * 12, [row.top1 for row in found.documents])
    assert found.top1.mean == pytest.approx(shares.difference)
    assert found.tokens == sum(row.tokens for row in found.documents)


@pytest.mark.slow
def test_an_adapter_agrees_with_itself(home):
    found = agreement(home, "same", margin=0.01)
    assert (found.kl.mean, found.kl.upper, found.top1.mean, found.verdict) == (0.0, 0.0, 1.0, "PASS")
    assert found.top1.lower < 1.0  # Tango's bound: twelve documents do not show 100 %
    assert found.adapter_kl.mean > 0
    assert found.adapter_top1.mean < 1
    assert "PASS at margin 0.01 nats" in found.headline
    assert found.plot().axes


@pytest.mark.slow
def test_a_verdict_at_a_margin(home):
    assert agreement(home, "bad", margin=1e-4).verdict == "FAIL"
    assert agreement(home, "bad", margin=1e3).verdict == "PASS"
    assert agreement(home, "bad").verdict is None
    with pytest.raises(ValueError, match="`margin` must be a finite number above 0; got 0"):
        agreement(home, "bad", margin=0)


@pytest.mark.slow
def test_the_task_is_certified_like_any_other(home):
    task = evaluation.agreement_task(home / "good", PROMPTS, margin=0.01)
    settings = {"tasks": task, "margin": 1.0, "progress": False}
    same = evaluation.certify(home / "base", home / "good", home / "same", **settings)
    assert (same.verdict, same.difference, same.margin) == ("PASS", 0.0, 0.01)
    damaged = evaluation.certify(home / "base", home / "good", home / "bad", **settings)
    assert damaged.verdict == "FAIL"
    found = agreement(home, "bad")
    assert damaged.difference == pytest.approx(-found.kl.mean, rel=1e-5)
    assert damaged.tasks[0].documents == tuple(row.document for row in found.documents)


@pytest.mark.slow
def test_models_in_memory_and_adapters_of_different_kinds(home, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(home / "base"),
        LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    model.get_base_model().lm_head.modules_to_save.default.weight.data *= 1.1
    model.save_pretrained(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    good = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "good")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    in_memory = evaluation.agreement(base, good, model, PROMPTS, tokenizer=tokenizer, progress=False)
    on_disk = evaluation.agreement(home / "base", home / "good", tmp_path / "saved", PROMPTS, progress=False)
    assert in_memory.kl.mean == pytest.approx(on_disk.kl.mean, rel=1e-5)
    assert in_memory.adapter_kl.mean == pytest.approx(on_disk.adapter_kl.mean, rel=1e-5)


@pytest.mark.slow
def test_prompts_that_are_refused(home, texts):
    with pytest.raises(EvaluationError, match="one document more than once"):
        agreement(home, "bad", ["the same text", "the same text"])
    with pytest.raises(TypeError, match="these prompts are batches"):
        agreement(home, "bad", texts, num_examples=3)
    assert len(agreement(home, "bad", texts).documents) == 64


@pytest.mark.slow
def test_the_command(home, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    arguments = [home / "good", home / "bad", "--base", home / "base", "--data", tmp_path / "prompts.txt"]

    def run(*more):
        command = [sys.executable, "-W", "ignore", "-m", "lorakit", "agree", *map(str, [*arguments, *more])]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kl"]["mean"] == pytest.approx(agreement(home, "bad").kl.mean, rel=1e-5)
    done = run("--margin", "0.0001")
    assert done.returncode == 1, done.stderr
    assert "likeliest next token" in " ".join(done.stdout.split())
    assert run("--device", "nowhere").returncode == 2
