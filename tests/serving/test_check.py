"""What servers will compute, against small reimplementations of how their readers scale an adapter."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from lorakit import serving
from lorakit.errors import AdapterFileError

FACTORS = {
    "model.layers.0.self_attn.q_proj": (torch.randn(8, 4), torch.randn(4, 6)),
    "model.layers.0.self_attn.v_proj": (torch.randn(8, 16), torch.randn(16, 6)),
}
MIXED = {"r": 16, "lora_alpha": 32, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}


# Each: the scaling that the server applies, from the config as JSON, the module's name and the rank of its tensors.
def _vllm_0_33(config, name, rank):
    """vLLM 0.33, vllm/lora/peft_helper.py, PEFTHelper.from_dict, and lora_model.py: patterns by module."""
    leaf = name.rpartition(".")[2]
    r = config.get("rank_pattern", {}).get(leaf, config["r"])
    alpha = config.get("alpha_pattern", {}).get(leaf, config["lora_alpha"])
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _vllm_0_28(config, name, rank):
    """vLLM 0.28, vllm/lora/peft_helper.py, PEFTHelper.__post_init__: one scaling."""
    r, alpha = config["r"], config["lora_alpha"]
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _sglang(config, name, rank):
    """SGLang 0.5.23, sglang/srt/lora/lora.py, LoRAAdapter.__init__: lora_alpha / r."""
    return config["lora_alpha"] / config["r"]


def _llama_cpp(config, name, rank):
    """llama.cpp, src/llama-adapter.h, llama_adapter_lora_weight::get_scale, of convert_lora_to_gguf.py's one alpha."""
    return config["lora_alpha"] / rank


def _tensorrt_llm(config, name, rank):
    """TensorRT-LLM, lora_manager.py: alpha over the tensor's own rank, or its root."""
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


READERS = {
    "vllm": _vllm_0_33,
    "vllm-0.28": _vllm_0_28,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "ollama": _llama_cpp,
    "tensorrt-llm": _tensorrt_llm,
}
CONFIGS = {
    "one rank": {"r": 16, "lora_alpha": 32},
    "mixed": MIXED,
    "one rank for all, patterns of alpha": {"r": 16, "lora_alpha": 32, "alpha_pattern": {"q_proj": 4}},
    "rsLoRA": {"r": 16, "lora_alpha": 32, "use_rslora": True},
    "mixed rsLoRA": MIXED | {"use_rslora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("server", READERS)
def test_the_applied_scaling_is_that_of_the_server_s_reader(server, name, write_adapter):
    config = {"rank_pattern": {}} | CONFIGS[name]
    ranks = {"q_proj": 4 if config["rank_pattern"] else 16, "v_proj": 16}
    factors = {
        module: (torch.randn(8, ranks[module.rpartition(".")[2]]), torch.randn(ranks[module.rpartition(".")[2]], 6))
        for module in FACTORS
    }
    directory = write_adapter("adapter", factors, **config)
    found = serving.check(directory, server)
    written = json.loads((directory / "adapter_config.json").read_text())
    if found.verdict == "refused":
        assert (server, name) in {("sglang", "mixed"), ("sglang", "mixed rsLoRA")}
        assert "different ranks (4, 16)" in found.refused[0]
        return
    for row in found.modules:
        expected = READERS[server](written, row.module_name, row.rank)
        true = _vllm_0_33(written, row.module_name, row.rank)
        assert row.applied_scaling == pytest.approx(expected)
        assert row.scaling == pytest.approx(true)
        assert row.applied_over_true == pytest.approx(expected / true)
    off = any(row.applied_over_true != pytest.approx(1) for row in found.modules)
    assert found.verdict == ("wrong" if off else "right")
    assert found.has_errors == off


@pytest.mark.parametrize(("rank", "factor"), [(8, 1), (16, 1), (32, 1), (14, 0.875), (24, 0.75), (72, 0.9), (4, 0.5)])
@pytest.mark.parametrize("server", ["lorax", "tgi"])
def test_kernels_that_scale_down_ranks_between_their_own(server, rank, factor, write_adapter):
    factors = {name: (torch.randn(80, rank), torch.randn(rank, 80)) for name in FACTORS}
    directory = write_adapter("adapter", factors, r=rank, lora_alpha=2 * rank, rank_pattern={})
    found = serving.check(directory, server)
    assert [row.applied_over_true for row in found.modules] == pytest.approx([factor, factor])
    assert found.verdict == ("right" if factor == 1 else "wrong")
    if factor != 1:
        assert found.next_steps == (f"lorakit export {directory} served/ --for {server}",)


@pytest.mark.parametrize(("rank", "flags"), [(16, ()), (17, ("--max-lora-rank 32",)), (216, ("--max-lora-rank 256",))])
def test_the_flag_that_vllm_needs(rank, flags, write_adapter):
    factors = {name: (torch.randn(8, rank), torch.randn(rank, 6)) for name in FACTORS}
    directory = write_adapter("adapter", factors, r=rank, lora_alpha=rank, rank_pattern={})
    found = serving.check(directory, "vllm")
    assert (found.verdict, found.flags) == ("right", flags)


def test_a_rank_above_every_tier_is_refused(write_adapter):
    directory = write_adapter("adapter", {"q_proj": (torch.randn(8, 513), torch.randn(513, 6))}, r=513, rank_pattern={})
    assert serving.check(directory, "vllm").refused == ("rank 513 is above its limit of 512",)


@pytest.mark.parametrize("server", serving.PROFILES)
def test_every_profile_gives_a_whole_report(server, write_adapter):
    directory = write_adapter("adapter", FACTORS, **MIXED)
    found = serving.check(directory, server)
    assert found.version
    assert found.source
    assert found.evidence in ("ran", "read")
    assert len(found.modules) == len(found.to_dict()["modules"]) == 2
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["summary"]["server"] == server
    assert server in found.headline
    assert len(repr(found)) < 2000
    assert found.plot().axes
    if found.verdict in ("refused", "own format"):
        assert all(row.applied_over_true is None for row in found.modules)


def test_what_is_more_than_factors_is_refused_by_name(write_adapter, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path / "dora")
    assert "DoRA magnitudes" in serving.check(tmp_path / "dora", "vllm").refused[0]
    assert serving.check(tmp_path / "dora", "peft").verdict == "right"
    assert serving.check(tmp_path / "dora", "tensorrt-llm").verdict == "right"


def test_old_versions_of_peft(write_adapter):
    directory = write_adapter("adapter", FACTORS, **MIXED | {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 4}})
    assert "begin with ^" in serving.check(directory, "peft-0.14").refused[0]
    assert serving.check(directory, "peft").verdict == "right"
    directory = write_adapter("adapter", FACTORS, **MIXED | {"lora_bias": False})
    assert "fields that it does not know: lora_bias" in serving.check(directory, "peft-0.13").refused[0]


def test_unknown_servers_and_broken_adapters(write_adapter, tmp_path):
    directory = write_adapter("adapter", FACTORS, **MIXED)
    with pytest.raises(ValueError, match=r"`server` must be one of peft, .*; got 'llamacpp'\."):
        serving.check(directory, "llamacpp")
    with pytest.raises(AdapterFileError):
        serving.check(tmp_path / "nowhere", "vllm")


@pytest.mark.slow
def test_the_command(write_adapter):
    directory = write_adapter("adapter", FACTORS, **MIXED)

    def run(*arguments):
        command = [sys.executable, "-m", "lorakit", "servable", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(serving.PROFILES)
    factors = [row["applied_over_true"] for row in found["llama.cpp"]["modules"]]
    assert factors == pytest.approx([4.0, 1.0])
    assert run("--for", "vllm,peft").returncode == 0
    done = run("--for", "llama.cpp,vllm")
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert "× 4" in done.stdout
    assert f"lorakit export {directory} served/ --for llama.cpp" in done.stdout
    done = run("--for", "llama")
    assert (done.returncode, done.stdout) == (2, "")
    assert "must be one of" in done.stderr
