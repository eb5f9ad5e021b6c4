"""Small fleets of adapters."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

SHAPES = {"q_proj": (12, 16), "v_proj": (8, 16)}


@pytest.fixture
def factors():
    """Makes random (B, A) by module name."""

    def make(seed: int, rank: int = 4, layers: int = 3):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            f"model.layers.{layer}.self_attn.{name}": (draw(d_out, rank), draw(rank, d_in))
            for layer in range(layers)
            for name, (d_out, d_in) in SHAPES.items()
        }

    return make


@pytest.fixture
def write():
    """Writes factors as PEFT would, into a directory."""

    def save(directory, factors, dtype=torch.float32, **config):
        directory.mkdir(parents=True)
        tensors = {}
        for module, (B, A) in factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.to(dtype, copy=True).contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = B.to(dtype, copy=True).contiguous()
        save_file(tensors, directory / "adapter_model.safetensors")
        rank = next(iter(factors.values()))[1].shape[0]
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "base"} | config
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    return save
