"""The view of adapters in a live model."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from closeness import assert_close_outputs
from peft import LoraConfig, get_peft_model

from lorakit import FisherLoRAConfig
from lorakit.adapters.in_model import live_modules, read_weight, resolve_adapter_name, write_weight


def test_names_roles_ranks_and_updates(tiny_llama, randomize):
    model = randomize(get_peft_model(tiny_llama(), FisherLoRAConfig(r=6, r_q=2, use_rslora=True)))
    modules = live_modules(model, "default")
    assert [m.name for m in modules[:2]] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert [(m.role, m.rank) for m in modules[:2]] == [("query", 2), ("value", 6)]
    for module in modules:
        assert module.is_linear()
        assert torch.allclose(module.factors().dense(), module.layer.get_delta_weight("default"), atol=1e-6)
    assert [m.name for m in modules] == model.base_model.targeted_module_names


def test_embeddings_and_convolutions_are_seen_but_not_linear(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    assert {m.name.rpartition(".")[2]: m.is_linear() for m in live_modules(model, "default")} == {
        "embed_tokens": False,
        "q_proj": True,
    }


def test_offloaded_weights_are_read_and_written(tiny_llama, randomize):
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])))
    module = live_modules(model, "default")[0]
    expected = module.up.weight.detach().clone()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert module.up.weight.is_meta
    assert torch.equal(read_weight(module.up), expected)
    write_weight(module.up, expected + 1)
    assert module.up.weight.is_meta
    assert torch.equal(read_weight(module.up), expected + 1)
    assert_close_outputs(module.up(torch.eye(2)), (expected + 1).T)


def test_which_adapter_is_meant(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert resolve_adapter_name(model, None) == "default"
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    assert resolve_adapter_name(model, "b") == "b"
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"active are \['default', 'b'\]"):
        resolve_adapter_name(model, None)
