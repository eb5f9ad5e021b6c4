"""The smallest plain LoRA at which a task survives: of a model, of files, and of SpecLoRA, whose mask needs its base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lorakit import SpecLoRAConfig, evaluation
from lorakit.errors import ExportError, OverwriteError
from lorakit.evaluation._digests import adapter_digest
from lorakit.export import to_lora


@pytest.fixture
def base(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data *= 40  # so that what follows depends on what precedes
    return model


def saved(base, config, directory):
    """An adapter on disk whose low-rank updates have rank 1, beside a mask where there is one."""
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data[:, :1] = 0.5 * torch.randn(len(parameter), 1)
        elif "lora_spec" in name:
            parameter.data += 20 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    model.unload()
    return directory


def logits_task(base, adapter, margin=1e-4):
    """Minus the mean absolute difference from the adapter's own logits, a token: 0 for the adapter itself."""
    ids = torch.randint(1, 64, (24, 6), generator=torch.Generator().manual_seed(3))
    with evaluation._attach.adapted(base, adapter) as model, torch.no_grad():
        wanted = model(input_ids=ids).logits

    def near(model):
        return -(model(input_ids=ids).logits - wanted).abs().mean((1, 2))

    return evaluation.function(near, margin=margin)


@pytest.mark.parametrize("config", [LoraConfig, SpecLoRAConfig])
def test_the_smallest_rank_that_passes_is_written(base, tmp_path, config):
    more = {} if config is LoraConfig else {"k": 3}
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": True}
    adapter = saved(base, config(r=8, **settings, **more), tmp_path / "adapter")
    task = logits_task(base, adapter)
    report = to_lora(adapter, tmp_path / "out", rank="smallest", base=base, tasks=task, margin=9, progress=False)
    # A rank-1 update, and a mask of k = 3 rows as three more ranks: 4 is exact, 2 is not.
    passing = 1 if config is LoraConfig else 4
    assert report.rank == passing
    assert report.rank_before == 8
    assert [step.rank for step in report.steps] == ([4, 2, 1] if config is LoraConfig else [8, 4, 2])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == passing
    certificate = evaluation.read_certificate(tmp_path / "out")
    certificate.verify()
    certificate.check_candidate(tmp_path / "out")
    assert certificate == report.certificate
    assert certificate.hashes["reference"] == [adapter_digest(adapter)]
    assert (tmp_path / "out" / "README.md").read_text().count("Did the task survive?") == 1
    assert not any(tmp_path.glob(".*"))  # nothing half-written
    assert not any("lora" in name for name, _ in base.named_parameters())  # the base is as it was
    plain = PeftModel.from_pretrained(base, tmp_path / "out")
    assert type(plain.peft_config["default"]) is LoraConfig


def test_a_model_in_memory_is_its_own_reference(base, tmp_path):
    adapter = saved(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    task = logits_task(base, adapter)
    model = PeftModel.from_pretrained(base, adapter)
    report = to_lora(model, tmp_path / "out", rank="smallest", tasks=task, margin=9, progress=False)
    assert report.rank == 1
    assert "adapter 'default' at rank 1" in report.certificate.candidate[0]
    model.load_adapter(adapter, "other")
    with pytest.raises(ExportError, match=r"'other' must be the active one .* set_adapter\('other'\)"):
        to_lora(model, tmp_path / "b", rank="smallest", tasks=task, margin=9, adapter_name="other")


def test_what_is_refused(base, tmp_path):
    adapter = saved(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    task = evaluation.function(lambda model: [1.0] * 20, name="few")
    asked = {"base": base, "tasks": task, "margin": 0.1, "progress": False}
    with pytest.raises(TypeError, match="needs `tasks` and `margin`"):
        to_lora(adapter, tmp_path / "out", rank="smallest", base=base)
    with pytest.raises(TypeError, match="`base` must be given for an adapter at rest"):
        to_lora(adapter, tmp_path / "out", rank="smallest", tasks=task, margin=0.1)
    with pytest.raises(TypeError, match="`tasks` is for `rank='smallest'`; got rank=4"):
        to_lora(adapter, tmp_path / "out", rank=4, **asked)
    with pytest.raises(ExportError, match="has rank 2, and no lower rank is served"):
        to_lora(adapter, tmp_path / "out", rank="smallest", for_server="lorax", **asked)
    with pytest.raises(OverwriteError, match="the directory of the adapter itself"):
        to_lora(adapter, adapter, rank="smallest", **asked)
    report = to_lora(adapter, tmp_path / "out", rank="smallest", **asked)  # twenty documents say too little
    assert (report.rank, report.path) == (None, None)
    assert not (tmp_path / "out").exists()
