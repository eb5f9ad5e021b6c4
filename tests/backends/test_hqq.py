"""What hqq alone does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import SpecLoRAConfig

pytest.importorskip("hqq")


def one_layer(nbits: int = 4, axis: int = 1, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=bias).requires_grad_(False)
    quantization = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=axis)
    return nn.Sequential(HQQLinear(linear, quantization, compute_dtype=dtype, device="cpu"))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_block_at_every_width_of_the_codes(nbits, axis, dtype):
    model = one_layer(nbits, axis, dtype)
    W = model[0].dequantize()
    layer = get_peft_model(model, SpecLoRAConfig(r=2, k=5, target_modules=["0"])).base_model.model[0]
    block = layer.lora_spec["default"].block
    assert block.dtype == dtype
    assert torch.equal(block, W[:5, :5])
    assert type(layer).__name__ == "SpecLoRAHqqLoraLinear"


def test_options_that_peft_s_layer_refuses_are_refused_and_leave_the_model_as_it_was():
    for options in ({"lora_bias": True},):
        refusals = []
        for cls, own in ((LoraConfig, {}), (SpecLoRAConfig, {"k": 5})):
            model = one_layer()
            with pytest.raises(ValueError, match="does not support lora_bias") as refusal:
                get_peft_model(model, cls(r=2, target_modules=["0"], **own, **options))
            refusals.append(str(refusal.value))
        assert refusals[0] == refusals[1]
        assert type(model[0]).__name__ == "HQQLinear"
