"""Adapters written from their factors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F


@pytest.fixture
def write_adapter(tmp_path):
    """Writes an adapter of the given (B, A) by module name, as PEFT would, and returns its directory."""

    def write(name, factors, **config):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        tensors = {}
        for module, (B, A) in factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{module}.lora_B.weight"] = B.clone(memory_format=torch.contiguous_format)
        save_file(tensors, directory / "adapter_model.safetensors")
        ranks = {module: A.shape[0] for module, (_, A) in factors.items()}
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "rank_pattern": ranks} | config
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    return write


@pytest.fixture(scope="session")
def updates():
    """By module, an adapter's ΔW in float64, from the factors and the scaling that PEFT's layers have."""

    def find(model, adapter_name="default"):
        found = {}
        for name, layer in model.get_base_model().named_modules():
            if adapter_name in getattr(layer, "lora_A", {}):
                B, A = (half[adapter_name].weight.detach().double() for half in (layer.lora_B, layer.lora_A))
                found[name] = (layer.scaling[adapter_name] * B @ A).numpy()
        return found

    return find


@pytest.fixture(scope="session")
def from_spectrum():
    """Factors (B, A), of rank len(sigma), whose product has these singular values, to float64."""

    def make(sigma, d_out=24, d_in=20, seed=0):
        generator = torch.Generator().manual_seed(seed)
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        U, V = (
            torch.linalg.qr(torch.randn(d, len(sigma), generator=generator, dtype=torch.float64)).Q
            for d in (d_out, d_in)
        )
        return U * sigma, V.T.contiguous()

    return make


@pytest.fixture(scope="session")
def in_memory():
    """An open adapter of the given (B, A) by module, with no file, of scaling 1."""
    from lorakit.adapters.assemble import assemble
    from lorakit.adapters.disk import TensorDict
    from lorakit.adapters.settings import AdapterSettings

    def make(factors, path="in memory", **config):
        tensors = {}
        for module, (B, A) in factors.items():
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        ranks = {module: A.shape[0] for module, (_, A) in factors.items()}
        settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
        return assemble(path, AdapterSettings.from_config(settings | config), TensorDict(tensors))

    return make


@pytest.fixture
def data():
    """Five examples to train on."""
    generator = torch.Generator().manual_seed(6)
    ids = [torch.randint(1, 64, (6,), generator=generator) for _ in range(5)]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def evaluate():
    """The losses of four others, in eval mode."""
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(7))

    def run(model):
        assert not model.training
        return F.cross_entropy(model(input_ids=ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    return run
