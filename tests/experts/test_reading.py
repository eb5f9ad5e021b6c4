"""Experts stacked in parameters, as they are read from files and from models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.adapters import open_adapter
from lorakit.adapters.experts import expert_group, nested_paths, parameters_of, stacked, unstacked
from lorakit.errors import AdapterFileError

from .conftest import adapted, dense, saved, wrappers


def test_each_expert_s_update_is_that_of_numpy_and_of_peft(base, tmp_path):
    model = adapted(base)
    directory = saved(model, tmp_path / "a")
    for source in (directory, model):
        adapter = open_adapter(source)
        assert adapter.findings == ()
        stacks = [module for module in adapter.modules if module.experts is not None]
        assert [(m.name, m.rank, m.scaling, m.experts) for m in stacks] == [
            (f"model.layers.{i}.mlp.experts.{leaf}", rank, 6 / rank, 4)
            for i in range(2)
            for leaf, rank in (("down_proj", 2), ("gate_up_proj", 3))
        ]
        for module in stacks:
            found = adapter.factors(module).dense()
            expected = dense(directory, module.path, 4, module.scaling)
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
            layer = wrappers(model)[module.path]
            assert layer.parameter_name == module.name.rpartition(".")[2]
            theirs = layer.get_delta_weight("default")
            is_transposed = getattr(layer.get_base_layer(), "is_transposed", False)
            torch.testing.assert_close(theirs.mT if is_transposed else theirs, found)


def test_batches_of_stacks_are_stacked(base, tmp_path):
    adapter = open_adapter(saved(adapted(base), tmp_path))
    seen = []
    for modules, update in adapter.batches(numel=10**6):
        for i, module in enumerate(modules):
            assert torch.equal(update.dense()[i], adapter.factors(module).dense())
        seen += [module.name for module in modules]
    assert sorted(seen) == sorted(module.name for module in adapter.modules)


def test_a_file_whose_rows_are_not_those_of_experts_is_an_error(mixtral, tmp_path):
    directory = saved(adapted(mixtral, target_parameters=["experts.down_proj"], rank_pattern={}), tmp_path)
    config = json.loads(Path(directory, "adapter_config.json").read_text())
    Path(directory, "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    adapter = open_adapter(directory)
    assert {finding.code for finding in adapter.findings} == {"shape_mismatch", "rank_mismatch"}
    message = r"model\.layers\.0\.mlp\.experts\.down_proj: A \(12, 24\) and B \(16, 12\) are not .* rank 5"
    with pytest.raises(AdapterFileError, match=message):
        adapter.check()


def test_a_parameter_called_weight_is_its_module(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

    base = nn.ModuleDict({"experts": Experts(), "q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.weight", "k_proj.weight"])
    model = get_peft_model(base, config)
    for source in (saved(model, tmp_path), model):
        modules = open_adapter(source).modules
        assert [(m.name, m.kind, m.experts) for m in modules] == [
            ("experts", "experts", 3),
            ("k_proj", "linear", None),
            ("q_proj", "linear", None),
        ]


def test_a_target_without_its_module_s_name(mixtral, tmp_path):
    directory = saved(adapted(mixtral, target_parameters=["down_proj"], rank_pattern={}), tmp_path)
    names = [module.name for module in open_adapter(directory).modules if module.experts == 4]
    assert names == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]


def test_unknown_parameters_are_named_by_their_paths():
    paths = ["0.experts", "0.experts.base_layer", "0.q_proj"]
    found = parameters_of(paths, {}, ["experts.first", "experts.second"])
    assert found == {"0.experts": "0.experts", "0.experts.base_layer": "0.experts.base_layer"}


def test_paths_of_parameters_that_are_adapted_together():
    apart = {"0.experts.down_proj": "0.experts", "0.experts.gate_up_proj": "0.experts"}
    together = {"0.experts.down_proj": "0.experts", "0.experts.gate_up_proj": "0.experts.base_layer"}
    assert nested_paths(apart) == together
    assert nested_paths(together) == together
    assert nested_paths({"0.experts": "0.experts"}) == {"0.experts": "0.experts"}
    with pytest.raises(KeyError, match=r"0\.experts\.mine"):
        nested_paths({"0.experts.mine": "0.experts", "0.experts.down_proj": "0.experts"})


def test_experts_that_are_modules_have_a_group():
    assert expert_group("model.layers.0.block_sparse_moe.experts.12.w1") == (
        "model.layers.0.block_sparse_moe.experts.*.w1",
        12,
    )
    assert expert_group("encoder.block.1.layer.1.mlp.experts.expert_3.wi") == (
        "encoder.block.1.layer.1.mlp.experts.*.wi",
        3,
    )
    assert expert_group("model.layers.0.mlp.shared_experts.0.up_proj") is None


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_stacking_is_undone(experts, d_out, rank, d_in):
    B, A = torch.randn(experts, d_out, rank), torch.randn(experts, rank, d_in)
    flat_B, flat_A = stacked(B, A)
    assert flat_B.shape == (d_out, rank * experts)
    assert flat_A.shape == (experts * rank, d_in)
    again_B, again_A = unstacked(flat_B, flat_A, experts)
    assert torch.equal(again_B, B)
    assert torch.equal(again_A, A)


def test_a_missing_half_of_a_stack_is_an_error(mixtral, tmp_path):
    directory = saved(adapted(mixtral), tmp_path)
    file = Path(directory, "adapter_model.safetensors")
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"]
    save_file(tensors, file)
    (finding,) = open_adapter(directory).findings
    assert finding.code == "missing_half"
    assert finding.module_name == "model.layers.0.mlp.experts.gate_up_proj"
