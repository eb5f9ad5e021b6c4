"""The private names of PEFT and torch that lorakit.experiments uses exist and behave as it expects."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorakit.adapters.tuner_layers import trained_in_full
from lorakit.experiments import _private

PEFT, TORCH = f"PEFT {peft.__version__}", f"torch {torch.__version__}"


@pytest.fixture
def model():
    base = nn.ModuleDict({"a": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["a"]))
    return model


@pytest.fixture
def layer(model):
    (layer,) = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return layer


def test_names_of_adapters(model, layer):
    assert hasattr(layer, "_all_available_adapter_names"), f"{PEFT}: layers have no `_all_available_adapter_names`"
    assert _private.adapter_names(layer) == ["default", "other"], f"{PEFT}: `_all_available_adapter_names` changed"
    ((name, wrapper),) = trained_in_full(model)
    assert name == "head"
    assert hasattr(wrapper, "_get_available_adapters"), f"{PEFT}: wrappers have no `_get_available_adapters`"
    assert _private.trained_copies(wrapper) == {"default"}, f"{PEFT}: `_get_available_adapters` changed"


def test_switches_are_restored(layer):
    assert layer._disable_adapters is False, f"{PEFT}: `_disable_adapters` is no longer the switch of a layer"
    with _private.preserved_switches([layer]):
        layer.enable_adapters(False)
        assert layer._disable_adapters is True, f"{PEFT}: enable_adapters(False) no longer sets `_disable_adapters`"
    assert layer.disable_adapters is False, f"{PEFT}: `_disable_adapters` no longer switches a layer"


def test_parameters_are_restored():
    module = nn.Linear(2, 2)
    before = _private.own_parameters(module)
    assert list(before) == ["weight", "bias"], f"{TORCH}: nn.Module keeps its parameters elsewhere than `_parameters`"
    del module.bias
    module.register_parameter("more", nn.Parameter(torch.ones(1)))
    _private.restore_parameters(module, before)
    assert dict(module.named_parameters()) == before, f"{TORCH}: `_parameters` no longer holds the parameters"
