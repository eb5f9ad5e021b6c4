"""What torchao alone does."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_outputs
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import SpecLoRAConfig

pytest.importorskip("torchao")


def one_layer() -> nn.Module:
    """Quantized by torchao's own API, so that PEFT does not know how to do it again."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, Int8WeightOnlyConfig())
    return model


@pytest.mark.filterwarnings("ignore:.*was instantiated without `get_apply_tensor_subclass`")
def test_a_merge_that_peft_refuses_leaves_the_layer_as_it_was(randomize):
    x, refusals = torch.randn(3, 64), []
    for config in (LoraConfig(r=2, target_modules=["0"]), SpecLoRAConfig(r=2, k=5, target_modules=["0"])):
        model = randomize(get_peft_model(one_layer(), config))
        before = model(x)
        with pytest.raises(ValueError, match="get_apply_tensor_subclass") as refusal:
            model.merge_adapter()
        refusals.append(str(refusal.value).replace("SpecLoRA", ""))
        layer = model.base_model.model[0]
        assert not layer.merged
        assert_close_outputs(model(x), before)
    assert refusals[0] == refusals[1]
    W = one_layer()[0].weight.dequantize()
    torch.testing.assert_close(layer.lora_spec["default"].block, W[:5, :5], rtol=0, atol=1e-6)
