"""Adapters written by hand, for the tests of what other programs read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def llama_adapter():
    """Writes an adapter of a Llama's query and key projections; returns the dict of its base's config."""
    return write_llama_adapter


def write_llama_adapter(path, ranks, *, heads=4, kv_heads=2, size=8, config=None, dtype=torch.float32, extra=None):
    generator = torch.Generator().manual_seed(0)
    tensors = dict(extra or {})
    for name, rank, d_out in zip(("q_proj", "k_proj"), ranks, (heads * size, kv_heads * size), strict=True):
        key = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 24, generator=generator).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator).to(dtype)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    pattern = {"k_proj": ranks[1]} if ranks[1] != ranks[0] else {}
    values = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 6, "rank_pattern": pattern}
    (path / "adapter_config.json").write_text(json.dumps(values | (config or {})))
    base = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 24, "vocab_size": 64}
    return base | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
