"""The audit's finding about servers that would apply another update than the adapter's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.export import to_lora
from lorakit.lens import audit
from lorakit.serving import check

QUERY, VALUE = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def factors(query=16, value=16):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(24, rank, generator=generator), torch.randn(rank, 24, generator=generator))
        for name, rank in ((QUERY, query), (VALUE, value))
    }


def served_wrong(report):
    return [finding for finding in report.findings if finding.code == "served_wrong"]


def names_after(message, phrase):
    """The servers in the sentence that begins with `phrase`, without what stands in brackets."""
    sentence = message.partition(phrase)[2].partition(". ")[0].removesuffix(".")
    return {part.strip().partition(" ")[0] for part in sentence.split(",")}


MIXED = {"r": 16, "lora_alpha": 32, "rank_pattern": {"q_proj": 4}}


def test_ranks_that_differ_at_one_scaling(write_adapter):
    directory = write_adapter("adapter", factors(query=4), **MIXED, alpha_pattern={"q_proj": 8})
    (finding,) = served_wrong(audit(directory))
    assert (finding.severity, finding.module_name) == ("warning", None)
    assert "llama.cpp (× 4 in 1 of 2 modules)" in finding.message  # 32 / 4 instead of 8 / 4
    assert names_after(finding.message, "scale updates wrongly:") == {"llama.cpp", "ollama", "tensorrt-llm"}
    assert "ranks from 4 to 16" in finding.message
    assert names_after(finding.message, "which these servers refuse:") == {"sglang", "lorax", "tgi"}
    assert not any(name in finding.message for name in ("mlx", "diffusers", "comfyui", "peft"))


def test_ranks_that_differ_at_one_alpha(write_adapter):
    (finding,) = served_wrong(audit(write_adapter("adapter", factors(query=4), **MIXED)))
    # llama.cpp divides by the tensor's own rank, which is right here; older vLLM by the config's.
    assert names_after(finding.message, "scale updates wrongly:") == {"vllm-0.28"}
    assert "vllm-0.28 (× 0.25 in 1 of 2 modules)" in finding.message


def test_a_server_is_named_exactly_where_its_check_is_wrong(write_adapter):
    directory = write_adapter("adapter", factors(), r=16, lora_alpha=32, use_rslora=True)
    (finding,) = served_wrong(audit(directory))
    named = names_after(finding.message, "scale updates wrongly:")
    assert named == {"sglang", "llama.cpp", "ollama", "lorax", "tgi"}
    for name in ("vllm", "vllm-0.28", "tensorrt-llm", *named):
        assert (check(directory, name).verdict == "wrong") == (name in named)
    assert "refuse" not in finding.message


@pytest.mark.parametrize("rank", [4, 16, 24])  # LoRAX's kernels are wrong at 4 and 24, for every adapter there is
def test_one_rank_and_one_alpha_are_no_finding(write_adapter, rank):
    report = audit(write_adapter("adapter", factors(rank, rank), r=rank, lora_alpha=3.5))
    assert served_wrong(report) == []
    assert not any("export" in step for step in report.next_steps)


def test_the_export_that_the_audit_proposes_ends_the_finding(tiny_llama, randomize, tmp_path):
    config = FisherLoRAConfig(r=8, r_q=2, lora_alpha=20, target_modules=["q_proj", "v_proj", "down_proj"])
    model = randomize(get_peft_model(tiny_llama(), config), seed=1)
    model.save_pretrained(tmp_path / "adapter")
    for source in (tmp_path / "adapter", model):
        assert len(served_wrong(audit(source))) == 1
    assert audit(tmp_path / "adapter").next_steps[-1].startswith(f"lorakit export {tmp_path / 'adapter'} ")
    to_lora(tmp_path / "adapter", tmp_path / "served")
    assert served_wrong(audit(tmp_path / "served")) == []


@pytest.mark.parametrize("kind", ["lora_bias", "SPECLORA"])
def test_servers_that_an_export_of_ranks_would_not_help_are_not_named(tiny_llama, kind, tmp_path):
    shared = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    config = SpecLoRAConfig(**shared, k=3) if kind == "SPECLORA" else LoraConfig(**shared, lora_bias=True)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    assert "sglang does not load" in check(tmp_path, "sglang").headline
    assert served_wrong(audit(tmp_path)) == []


def test_a_broken_adapter_has_its_errors_only(write_adapter):
    tensors = factors(query=4)
    report = audit(write_adapter("adapter", tensors, **MIXED | {"rank_pattern": {}}))
    assert report.has_errors
    assert served_wrong(report) == []
