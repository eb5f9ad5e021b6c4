"""The private names that lorakit.adapters uses: a failure here says which library changed them."""

from __future__ import annotations

import accelerate
import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lorakit.adapters import _private
from lorakit.adapters.in_model import read_weight, strip_wrappers


@pytest.fixture
def model():
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


def test_peft_names_the_adapters_of_a_layer(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    why = f"PEFT {peft.__version__} has changed BaseTunerLayer._all_available_adapter_names"
    assert hasattr(layer, "_all_available_adapter_names"), why
    assert _private.adapter_names(layer) == {"default", "other"}, why


def test_accelerate_keeps_offloaded_weights_in_its_hook(model):
    why = f"accelerate {accelerate.__version__} has changed module._hf_hook.weights_map"
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    cpu_offload(model, execution_device=torch.device("cpu"))
    up = layer.lora_B["default"]
    assert up.weight.is_meta
    assert hasattr(up._hf_hook, "weights_map"), why
    _private.set_offloaded_weights(up, {"weight": torch.full((4, 2), 5.0)})
    assert torch.equal(read_weight(up), torch.full((4, 2), 5.0)), why
    assert torch.equal(up(torch.eye(2)), torch.full((2, 4), 5.0)), why


def test_torch_keeps_parameters_in_a_dict():
    why = f"torch {torch.__version__} has changed Module._parameters"
    module = nn.Linear(2, 3)
    before = module.weight
    with _private.restored_parameters(module):
        module.weight = nn.Parameter(torch.zeros(1))
    assert module.weight is before, why


@pytest.mark.slow
def test_torch_names_its_wrappers(model):
    why = f"torch {torch.__version__} names its wrappers in another way"
    base = model.get_base_model()
    names = [name for name, _ in base.named_modules()]
    base[0] = torch.compile(checkpoint_wrapper(base[0]), backend="eager")
    wrapped = [name for name, _ in base.named_modules()]
    assert f"0.{_private.COMPILED}.{_private.CHECKPOINTED}.lora_A" in wrapped, why
    assert list(dict.fromkeys(map(strip_wrappers, wrapped))) == names, why
