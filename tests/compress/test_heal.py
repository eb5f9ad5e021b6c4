"""Healing: a cut adapter learns what the original predicts, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorakit import evaluation
from lorakit.compress import smallest, truncate
from lorakit.compress._heal import HealSettings, prepare
from lorakit.errors import EvaluationError
from lorakit.evaluation._attach import adapted

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter of rank 8 whose singular values are about equal, so that each cut loses much."""
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    return tmp_path / "adapter"


def texts(seed, count=48):
    ids = torch.randint(64, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "labels": part} for part in ids.split(8)]


def divergence(base, adapter, cut, batches):
    """KL(adapter ‖ cut), a token, written out in float64."""
    total = tokens = 0
    for batch in batches:
        predicted = []
        for one in (adapter, cut):
            with adapted(base, one) as model, torch.no_grad():
                predicted.append(model(input_ids=batch["input_ids"]).logits[:, :-1].double().softmax(-1))
        p, q = predicted
        total += (p * (p / q).log()).sum().item()
        tokens += p.shape[0] * p.shape[1]
    return total / tokens


@pytest.fixture
def task():
    return evaluation.function(lambda model: [1.0] * 600, name="any")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_healed_adapter_predicts_more_like_the_original_on_other_texts(base, adapter, task, tmp_path, dtype):
    stored = load_file(adapter / WEIGHTS)
    save_file({key: value.to(dtype) for key, value in stored.items()}, adapter / WEIGHTS)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    options = {"base": base, "tasks": task, "margin": 0.1, "progress": False, "verify": False}
    healing = {"heal_steps": 60, "heal_text": texts(0), "heal_learning_rate": 3e-3}
    report = smallest(adapter, tmp_path / "healed", **options, **healing)
    assert {step.rank for step in report.steps} == {4, 2, 1}
    for step in report.steps:
        assert step.healed.kl_after < 0.95 * step.healed.kl_before
        assert step.certificate.candidate == (f"{adapter} at rank {step.rank}, healed",)
    truncate(adapter, tmp_path / "cut", max_rank=report.rank, verify=False)
    others = texts(1)
    before, after = (divergence(base, adapter, tmp_path / name, others) for name in ("cut", "healed"))
    assert after < 0.95 * before
    # Only the factors' values are others, in the same names, shapes and dtypes; the base model is as it was.
    cut, healed = (load_file(tmp_path / name / WEIGHTS) for name in ("cut", "healed"))
    assert {k: (v.shape, v.dtype) for k, v in cut.items()} == {k: (v.shape, v.dtype) for k, v in healed.items()}
    assert all(value.dtype == dtype and not torch.equal(value, cut[key]) for key, value in healed.items())
    config = "adapter_config.json"
    assert (tmp_path / "cut" / config).read_bytes() == (tmp_path / "healed" / config).read_bytes()
    assert not any(parameter.requires_grad for name, parameter in base.named_parameters() if "lora" in name)
    for name, value in base.state_dict().items():
        assert torch.equal(value, weights[name])
    # The same again is the same, bit for bit.
    smallest(adapter, tmp_path / "again", **options, **healing)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(value, again[key]) for key, value in healed.items())
    assert "healed in 60 steps" in str(report)
    assert [set(row) >= {"kl_before", "kl_after"} for row in report.rows()] == [True] * 3
    assert "KL, healed" in report.tables()[0].headings


def test_the_first_step_starts_from_the_cut_adapters_divergence(base, adapter, task, tmp_path):
    (batch,) = texts(0, count=8)
    options = {"base": base, "tasks": task, "margin": 0.1, "progress": False}
    report = smallest(adapter, tmp_path / "out", **options, heal_steps=1, heal_text=[batch])
    for step in report.steps:
        truncate(adapter, tmp_path / str(step.rank), max_rank=step.rank)
        expected = divergence(base, adapter, tmp_path / str(step.rank), [batch])
        assert step.healed.kl_before == pytest.approx(expected, rel=1e-4)


def test_documents_of_a_task_are_refused_as_texts(base, adapter, tmp_path):
    batches = texts(0, count=16)
    with pytest.raises(EvaluationError, match="8 documents of task 'loss' were used for calibration or selection"):
        smallest(
            adapter,
            tmp_path / "out",
            base=base,
            tasks=evaluation.loss(batches[:1], name="loss"),
            margin=0.1,
            heal_steps=1,
            heal_text=batches,
            progress=False,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heal_steps": 3}, "`heal_text` is needed with `heal_steps`"),
        ({"heal_text": texts(0)}, "`heal_steps` must be a positive integer; got 0"),
        ({"heal_steps": 3, "heal_text": texts(0), "heal_learning_rate": -1.0}, "`heal_learning_rate` must be"),
        (
            {"heal_steps": 3, "heal_text": [{**texts(0)[0], "labels": torch.full((8, 12), -100)}]},
            "`heal_text` has no token",
        ),
        ({"heal_steps": 3, "heal_text": texts(0), "heal_learning_rate": 1e30}, r"not finite after \d steps"),
    ],
)
def test_what_is_refused(base, adapter, task, tmp_path, options, message):
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    settings = {"base": base, "tasks": task, "margin": 0.1, "progress": False}
    with pytest.raises((EvaluationError, ValueError), match=message):
        smallest(adapter, tmp_path / "out", **settings, **options)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


def test_padding_stays_zero(base, tmp_path):
    """A module of rank 1 is written at the others' rank, and learns in its own rank only."""
    config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 1}, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    truncate(tmp_path / "adapter", tmp_path / "cut", max_rank=4)
    before = load_file(tmp_path / "cut" / WEIGHTS)
    settings = HealSettings(steps=3, learning_rate=1e-3, length=16, seed=0)
    healing = prepare(base, tmp_path / "adapter", texts(0), None, settings, progress=False)
    healing.heal(base, tmp_path / "cut")
    after = load_file(tmp_path / "cut" / WEIGHTS)
    for key in before:
        real = 1 if "q_proj" in key else 4
        rows = (lambda t: t) if "lora_A" in key else (lambda t: t.T)
        old, new = rows(before[key]), rows(after[key])
        assert len(new) == 4
        assert not torch.equal(old[:real], new[:real])
        assert not new[real:].any()
