"""Adapters written from their factors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file


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
