"""Every writer, on every kind of adapter: all ways in which programs read a LoRA give the ΔW that was meant.

The readings: alpha over the config's r (SGLang, vLLM before 0.29); alpha over the tensor's own rank (llama.cpp, Ollama,
TensorRT-LLM); PEFT's own, by its patterns.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.compress import truncate
from lorakit.export import to_lora
from lorakit.merging import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MIXED = {"rank_pattern": {"0": 2, "2": 5}, "alpha_pattern": {"1": 3}}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.linear = nn.Linear(16, 12)
        self.conv = nn.Conv1d(12, 10, 3)
        self.grouped = nn.Conv1d(12, 8, 1, groups=4)


def linears(dtype=torch.float32):
    return nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 20), nn.Linear(20, 16)).to(dtype)


ALL = ["0", "1", "2"]
SOURCES = {
    "LoRA": lambda: (linears(), LoraConfig(r=4, lora_alpha=7, target_modules=ALL)),
    "mixed ranks": lambda: (linears(), LoraConfig(r=4, lora_alpha=7, target_modules=ALL, **MIXED)),
    "rsLoRA": lambda: (linears(), LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=ALL, **MIXED)),
    "FisherLoRA": lambda: (linears(), FisherLoRAConfig(r=6, target_modules=ALL, rank_pattern={"1": 2})),
    "SpecLoRA": lambda: (linears(), SpecLoRAConfig(r=3, k=5, k_pattern={"1": 2}, target_modules=ALL)),
    "large k": lambda: (linears(), SpecLoRAConfig(r=3, k=14, lora_alpha=5, target_modules=ALL)),
    "bfloat16": lambda: (linears(torch.bfloat16), LoraConfig(r=4, lora_alpha=8.75, target_modules=ALL, **MIXED)),
    "tiny alpha": lambda: (linears(), LoraConfig(r=4, lora_alpha=1e-10, target_modules=ALL, rank_pattern={"0": 2})),
    "negative alpha": lambda: (linears(), LoraConfig(r=4, lora_alpha=-3, target_modules=ALL, rank_pattern={"0": 2})),
    "alpha 0": lambda: (linears(), LoraConfig(r=4, lora_alpha=0, target_modules=ALL, rank_pattern={"0": 2})),
    "every layout": lambda: (
        Layers(),
        LoraConfig(r=4, lora_alpha=3, rank_pattern={"linear": 6}, target_modules=["embedding", "linear", "conv"]),
    ),
    "grouped": lambda: (
        Layers(),
        LoraConfig(r=8, lora_alpha=3, rank_pattern={"linear": 9}, target_modules=["grouped", "linear", "conv"]),
    ),
    "SpecLoRA, every layout": lambda: (
        Layers(),
        SpecLoRAConfig(r=4, lora_alpha=3, k=3, k_pattern={"linear": 5}, target_modules=["embedding", "linear", "conv"]),
    ),
}
# name → (writer of (model, path, out), whether it writes ΔW exactly, whether the file is compact)
WRITERS = {
    "export a model": (lambda model, path, out: to_lora(model, out), True, False),
    "export a model, compact": (lambda model, path, out: to_lora(model, out, pad=False), True, True),
    "export a path": (lambda model, path, out: to_lora(path, out), True, False),
    "export at rank 3": (lambda model, path, out: to_lora(model, out, rank=3), False, False),
    "export at a served rank": (lambda model, path, out: to_lora(model, out, rank="auto", energy=0.5), False, False),
    "export a path at a served rank": (lambda model, path, out: to_lora(path, out, rank="auto"), False, False),
    "export for LoRAX and Ollama": (
        lambda model, path, out: to_lora(model, out, for_server="lorax,ollama"),
        True,
        False,
    ),
    "compress by energy": (lambda model, path, out: truncate(path, out, energy=0.8), False, False),
    "compress in total": (lambda model, path, out: truncate(path, out, energy=0.8, energy_of="total"), False, False),
    "compress by budget": (lambda model, path, out: truncate(path, out, budget=400), False, False),
    "compress per module": (lambda model, path, out: truncate(path, out, energy=0.8, per_module=True), False, True),
    "compress to a rank": (lambda model, path, out: truncate(path, out, max_rank=3), False, False),
    "compress nothing": (lambda model, path, out: truncate(model, out, max_rank=99), True, False),
    "merge": (lambda model, path, out: merge([path, path], out, weights=[0.6, 0.4]), True, False),
    "merge, compact": (lambda model, path, out: merge([path, path], out, pad=False), True, True),
    "merge by svd": (lambda model, path, out: merge([path, path], out, method="svd"), True, False),
    "merge by energy": (lambda model, path, out: merge([path, path], out, energy=0.7), False, False),
    "merge by ties": (lambda model, path, out: merge([path], out, method="ties", density=0.5), False, False),
}
LIVE = ("export a model", "export a model, compact", "export at rank 3", "export at a served rank")
LIVE += ("export for LoRAX and Ollama",)


def refusal(source, writer):
    """The message of the error with which a writer refuses a source; None where it takes it."""
    layouts = source in ("every layout", "grouped", "SpecLoRA, every layout")
    if writer in LIVE:
        return "layer, which `rank` cannot truncate" if layouts and " at " in writer else None
    if "SpecLoRA" in source or source == "large k":
        return "SPECLORA adapter"
    return "grouped convolution" if source == "grouped" else None


def product(tensors, name):
    """B A of one module, from the file, in the layout of the base weight."""
    prefix = f"base_model.model.{name}"
    if f"{prefix}.lora_embedding_A" in tensors:
        A, B = (tensors[f"{prefix}.lora_embedding_{half}"].double() for half in "AB")
        return (B @ A).T.numpy(), len(A)
    A, B = (tensors[f"{prefix}.lora_{half}.weight"].double() for half in "AB")
    groups = len(A) // B.shape[1]
    parts = [
        torch.einsum("or,r...->o...", b.flatten(1), a) for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)
    ]
    return torch.cat(parts).numpy(), len(A)


def source_updates(model, directory):
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    tensors = load_file(directory / WEIGHTS)
    return {  # PEFT does not form the update of a grouped convolution
        name: layer.scaling["default"] * product(tensors, name)[0]
        if name == "grouped"
        else layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("source", SOURCES)
def test_all_readings_are_the_update_that_was_meant(source, writer, randomize, tmp_path):
    write, exact, compact = WRITERS[writer]
    base, config = SOURCES[source]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomize(get_peft_model(base, config, autocast_adapter_dtype=False), seed=5)
    model.save_pretrained(tmp_path / "source")
    before = source_updates(model, tmp_path / "source")
    message = refusal(source, writer)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            write(model, tmp_path / "source", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    report = write(model, tmp_path / "source", tmp_path / "out")
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    loaded = PeftModel.from_pretrained(SOURCES[source]()[0], tmp_path / "out", autocast_adapter_dtype=False)
    layers = {n: m for n, m in loaded.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    assert layers.keys() == before.keys() == {row.module_name for row in report.modules}
    alpha, r = written["lora_alpha"], written["r"]
    assert (report.lora_alpha, report.r) == (alpha, r)
    assert not written.get("use_rslora")
    tolerance = 3e-2 if source == "bfloat16" else 1e-5
    for name, layer in layers.items():
        BA, rank = product(tensors, name)
        peft = layer.scaling["default"] * BA
        if exact:
            scale = max(np.linalg.norm(before[name]), 1e-300)
            assert np.linalg.norm(peft - before[name]) <= tolerance * scale, name
        if not compact:
            assert rank == r
            for reading in (alpha / r, alpha / rank):
                assert np.linalg.norm(reading * BA - peft) <= 1e-12 * np.linalg.norm(peft)
    if not compact:
        assert not written.get("rank_pattern")
        assert not written.get("alpha_pattern")
        assert alpha != 0  # llama.cpp takes 0 for "no alpha"
        if source != "bfloat16":
            assert isinstance(alpha, int)
