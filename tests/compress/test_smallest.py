"""The ladder: what is written is the smallest rank that PASSes, and nothing where none does."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lorakit import evaluation
from lorakit.compress import smallest, truncate
from lorakit.errors import EvaluationError, OverwriteError
from lorakit.evaluation._digests import adapter_digest


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter of rank 8 whose updates have rank 2."""
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data[:, :2] = 0.5 * torch.randn(len(parameter), 2)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    return tmp_path / "adapter"


@pytest.fixture
def held_out(base, adapter):
    """Documents drawn from the adapter."""
    with evaluation._attach.adapted(base, adapter) as model, torch.no_grad():
        ids = torch.randint(64, (96, 1))
        for _ in range(11):
            ids = torch.cat([ids, torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)], 1)
    return evaluation.loss([{"input_ids": part, "labels": part} for part in ids.split(16)])


@pytest.mark.slow
def test_the_smallest_rank_that_passes_is_written(base, adapter, held_out, tmp_path):
    report = smallest(adapter, tmp_path / "out", base=base, tasks=held_out, margin=0.01, progress=False)
    assert [(step.rank, step.verdict) for step in report.steps] == [(4, "PASS"), (2, "PASS"), (1, "FAIL")]
    assert (report.rank, report.rank_before, report.path) == (2, 8, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    truncate(adapter, tmp_path / "by hand", max_rank=2)
    assert adapter_digest(tmp_path / "out") == adapter_digest(tmp_path / "by hand")
    certificate = evaluation.read_certificate(tmp_path / "out" / "lorakit_certificate.json")
    certificate.verify()
    assert certificate == report.certificate
    assert certificate.hashes["candidate"] == [adapter_digest(tmp_path / "out")]
    assert certificate.candidate == (f"{adapter} at rank 2",)
    assert certificate.sha256 in (tmp_path / "out" / "README.md").read_text()
    assert "rank 8 → 2" in report.headline
    assert [row["rank"] for row in report.rows()] == [4, 2, 1]
    assert [row[0] for row in report.tables()[0].rows] == ["4", "2", "1"]
    assert report.plot().axes
    json.dumps(report.to_dict(), allow_nan=False)
    # What was written is as good as the report says, and the base model is as it was.
    again = evaluation.certify(base, adapter, tmp_path / "out", tasks=held_out, margin=0.01, progress=False)
    assert again.difference == pytest.approx(report.certificate.difference, abs=1e-9)
    smallest(adapter, tmp_path / "out", base=base, tasks=held_out, margin=0.01, progress=False)  # runs again
    assert (tmp_path / "out" / "README.md").read_text().count("Did the task survive?") == 1


def test_nothing_is_written_where_none_passes(base, adapter, held_out, tmp_path):
    few = evaluation.function(lambda model: [1.0] * 20, name="few")
    report = smallest(adapter, tmp_path / "out", base=base, tasks=few, margin=0.01, progress=False)
    assert [(step.rank, step.verdict) for step in report.steps] == [(4, "INCONCLUSIVE")]
    assert (report.rank, report.path) == (None, None)
    assert not (tmp_path / "out").exists()
    assert "Nothing is written" in report.headline
    assert "documents of few" in report.next_steps[0]


@pytest.mark.slow
def test_the_reference_is_scored_once(base, adapter, tmp_path):
    seen = []

    def task(model):
        seen.append(type(model))
        return [float(i % 2) for i in range(600)]

    report = smallest(adapter, tmp_path / "out", base=base, tasks=task, margin=0.01, progress=False)
    assert report.rank == 1
    assert seen == [PeftModel if c is PeftModel else c for c in seen]
    assert len(seen) == 1 + len(report.steps)


def test_what_is_refused(base, adapter, held_out, tmp_path):
    with pytest.raises(OverwriteError, match="is the directory of the adapter itself"):
        smallest(adapter, adapter, base=base, tasks=held_out, margin=0.01)
    truncate(adapter, tmp_path / "one", max_rank=1)
    with pytest.raises(EvaluationError, match=r"`adapter` must have a rank above 1; .*one' has rank 1"):
        smallest(tmp_path / "one", tmp_path / "out", base=base, tasks=held_out, margin=0.01)
    with pytest.raises(ValueError, match="`margin` must be a finite number above 0; got -1"):
        smallest(adapter, tmp_path / "out", base=base, tasks=held_out, margin=-1)
