"""The private names of PEFT and torch that the tuners use are there and behave as expected."""

from __future__ import annotations

import inspect

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora, tuners_utils
from peft.tuners.lora import LoraModel, variants
from torch import nn

from lorakit.tuners import _private

PEFT_BROKE = f"PEFT {peft.__version__} changed {{}}: adapt lorakit/tuners."
TORCH_BROKE = f"torch {torch.__version__} changed {{}}: adapt lorakit/tuners/_private.py."


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (tuners_utils, "_get_in_out_features", ["module"]),
        (lora.LoraLayer, "_move_adapter_to_device_of_base_layer", ["self", "adapter_name"]),
        (lora.Embedding, "_get_embed_scale", ["self"]),
        # methods that the tuners override or call
        (
            LoraModel,
            "_create_and_replace",
            ["self", "lora_config", "adapter_name", "target", "target_name", "parent", "current_key"],
        ),
        (LoraModel, "_prepare_model", ["self", "peft_config", "model"]),
        (LoraModel, "_prepare_adapter_config", ["self", "peft_config", "model_config"]),
        (LoraModel, "_check_add_weighted_adapter", ["self", "adapters", "combination_type", "svd_rank"]),
        (
            LoraModel,
            "_svd_generalized_task_arithmetic_weighted_adapter",
            ["self", "combination_type", "adapters", "weights", "new_rank", "target", "target_lora_A", "target_lora_B"],
        ),
        (LoraModel, "_get_adapter_state_dict", ["model", "config", "adapter_name", "state_dict"]),
        (LoraModel, "_remap_adapter_state_dict_for_load", ["model", "config", "adapter_name", "state_dict"]),
        (
            LoraModel,
            "_convert_state_dict_for_initial_model",
            ["peft_model", "peft_config", "path_initial_model_for_weight_conversion"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_has_the_method_with_these_parameters(owner, name, parameters):
    method = getattr(owner, name, None)
    assert callable(method), PEFT_BROKE.format(name)
    assert list(inspect.signature(method).parameters)[: len(parameters)] == parameters, PEFT_BROKE.format(name)


def test_features_of_a_base_layer():
    assert _private.in_and_out_features(nn.Linear(3, 5)) == (3, 5), PEFT_BROKE.format("_get_in_out_features")


def test_an_adapter_moves_to_the_base_layer_s_device():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4, device="meta")), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"] = nn.Linear(4, 8)
    _private.move_adapter_to_base_device(layer, "default")
    assert layer.lora_A["default"].weight.is_meta, PEFT_BROKE.format("_move_adapter_to_device_of_base_layer")


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0


@pytest.mark.parametrize(("cls", "expected"), [(nn.Embedding, None), (ScaledEmbedding, 3.0)])
def test_the_scale_of_an_embedding(cls, expected):
    model = get_peft_model(nn.Sequential(cls(4, 4)), LoraConfig(target_modules=["0"]))
    found = _private.embedding_scale(model.base_model.model[0])
    assert (found if found is None else float(found)) == expected, PEFT_BROKE.format("_get_embed_scale")


@pytest.mark.skipif(not hasattr(variants, "KasaLinearVariant"), reason="KaSA came with PEFT 0.21")
def test_kasa_s_deferred_truncation():
    from peft import KasaConfig

    with torch.device("meta"):
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], kasa_config=KasaConfig())
        )
    layer = model.base_model.model[0]
    assert _private.awaits_kasa_truncation(layer, "default"), PEFT_BROKE.format("_lora_kasa_truncation_deferred")
    layer.to_empty(device="cpu")
    nn.init.normal_(layer.base_layer.weight)
    before = layer.base_layer.weight.clone()
    _private.apply_kasa_truncation(layer.lora_variant["default"], layer, "default")
    assert not _private.awaits_kasa_truncation(layer, "default"), PEFT_BROKE.format("_apply_deferred_truncation")
    assert not torch.equal(layer.base_layer.weight, before)


def test_a_wrapped_parameter_says_whether_its_sides_are_exchanged():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 6))

    model = get_peft_model(
        nn.ModuleDict({"up": Experts()}), LoraConfig(r=2, target_modules=[], target_parameters=["up.weight"])
    )
    wrapper = model.base_model.model["up"]
    assert isinstance(_private.swaps_in_and_out(wrapper), bool), PEFT_BROKE.format("_did_swap_in_out_features")
    d_out, d_in = wrapper.get_delta_weight("default").shape[1:]
    sides = (wrapper.in_features, wrapper.out_features)
    expected = (d_in, d_out) if _private.swaps_in_and_out(wrapper) else (d_out, d_in)
    assert sides == expected, PEFT_BROKE.format("_did_swap_in_out_features")


def test_a_convolution_with_another_weight():
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = conv(x) - conv.bias[:, None, None]
        found = _private.convolve(conv, x, conv.weight)
    torch.testing.assert_close(found, expected, msg=TORCH_BROKE.format("_conv_forward"))


def test_the_registries_of_a_module_are_its_own():
    module = nn.Sequential(nn.Linear(2, 2))
    _private.children(module)["1"] = nn.Linear(2, 3)
    assert len(module) == 2, TORCH_BROKE.format("Module._modules")
    parameters, buffers, attributes = _private.registries(nn.BatchNorm1d(2))
    assert set(parameters) == {"weight", "bias"}, TORCH_BROKE.format("Module._parameters")
    assert "running_mean" in buffers, TORCH_BROKE.format("Module._buffers")
    assert "eps" in attributes


def test_functorch_transforms_are_seen():
    seen = []

    def function(x):
        seen.append(_private.in_functorch_transform())
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [False, True], TORCH_BROKE.format("_C._are_functorch_transforms_active")
