"""What bitsandbytes alone does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import SpecLoRAConfig
from lorakit.cost._optimizers import OPTIMIZERS
from lorakit.surgery import reweight, sensitivity

bnb = pytest.importorskip("bitsandbytes")


def one_layer(**options: object) -> nn.Module:
    """A 4-bit layer with float32 biases, quantized by bitsandbytes' own API, in a model that says so to PEFT."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, **options)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    model = nn.Sequential(layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_compute_dtype_that_was_not_given_is_still_that_of_the_first_input(quant_type):
    model = one_layer(quant_type=quant_type)
    base = model[0]
    assert not base.compute_type_is_set
    adapted = get_peft_model(model, SpecLoRAConfig(r=2, k=5, target_modules=["0"]))
    assert base.compute_dtype is None
    assert not base.compute_type_is_set
    assert base.bias.dtype == torch.float32
    layer = adapted.base_model.model[0]
    assert layer.lora_spec["default"].block.dtype == torch.float32
    adapted(torch.randn(3, 64, dtype=torch.bfloat16).requires_grad_())
    assert base.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["hadamard", "svd"])
@pytest.mark.parametrize("eval_mode", [False, True])
def test_the_weight_is_not_repacked_for_inference(mode, eval_mode):
    """As bitsandbytes does on processors with AVX512-BF16; gradients do not pass through the repacked weight."""
    model = one_layer(quant_type="nf4").train(not eval_mode)
    base = model[0]
    base.support_avx512bf16_for_cpu = True
    packed = base.weight.data.clone()
    adapted = get_peft_model(model, SpecLoRAConfig(r=2, k=5, mode=mode, target_modules=["0"]))
    assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(base.weight.data, packed)
    x = torch.randn(3, 64).requires_grad_()
    adapted(x).sum().backward()
    assert (x.grad != 0).any()


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a processor with AVX512-BF16")
def test_the_block_of_a_weight_that_has_been_repacked_before():
    model = one_layer(quant_type="nf4").eval()
    W = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
    with torch.no_grad():
        model(torch.randn(3, 64))
    assert model[0].weight.quant_state.packing_format_for_cpu
    adapted = get_peft_model(model, SpecLoRAConfig(r=2, k=5, target_modules=["0"]))
    block = adapted.base_model.model[0].lora_spec["default"].block
    assert (block - W[:5, :5]).abs().max() <= 2**-7 * W.abs().max()


def test_int8_with_a_threshold_below_the_inputs():
    """At which bitsandbytes takes columns out of the int8 product."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=0.5)
    layer.load_state_dict(nn.Linear(64, 48).state_dict())
    model = nn.Sequential(layer.to("cpu"))
    model.is_loaded_in_8bit = True
    W = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    adapted = get_peft_model(model, SpecLoRAConfig(r=2, k=5, target_modules=["0"]))
    block = adapted.base_model.model[0].lora_spec["default"].block
    assert (block - W[:5, :5]).abs().max() <= 2**-10 * W.abs().max()


@pytest.fixture
def four_bits(files):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(load_in_4bit=True)
    return AutoModelForCausalLM.from_pretrained(files, quantization_config=quantized, device_map="cpu")


@pytest.fixture
def calibration():
    """Batches of any size, of the same examples of four lengths."""
    generator = torch.Generator().manual_seed(4)
    examples = [torch.randint(1, 64, (length,), generator=generator) for length in (5, 7, 9, 4, 6, 8, 3, 2)]

    def make(batch_size: int = 2) -> list[dict[str, torch.Tensor]]:
        batches = []
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            pad = nn.utils.rnn.pad_sequence
            batches.append(
                {
                    "input_ids": pad(part, batch_first=True),
                    "attention_mask": pad([torch.ones_like(ids) for ids in part], batch_first=True),
                    "labels": pad(part, batch_first=True, padding_value=-100),
                }
            )
        return batches

    return make


def test_surgery_on_a_4_bit_base(four_bits, calibration, randomize):
    """Its sensitivities are those on the dequantized base, whatever the batches, and the edit can be undone."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    model = randomize(get_peft_model(four_bits, config), std=0.2)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its repacked weights are rounded to bfloat16
    plain = copy.deepcopy(model)
    for layer in [module for module in plain.modules() if hasattr(module, "lora_A")]:
        base = layer.get_base_layer()
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        dense.weight.data = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        dense.bias = base.bias
        layer.base_layer = dense
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, many, reference = (
        sensitivity(m, calibration(size), progress=False) for m, size in ((model, 1), (model, 4), (plain, 2))
    )
    for a, b, c in zip(one.modules, many.modules, reference.modules, strict=True):
        assert (a.per_example - b.per_example).abs().max() <= 1e-5 * a.per_example.abs().max()
        assert (a.per_example - c.per_example).abs().max() <= 1e-4 * c.per_example.abs().max()
    edit = reweight(model, calibration(), progress=False)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(".lora_" in key for key in changed)
    edit.undo()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("n", [100, 4095, 4096, 70_001])
def test_8_bit_optimizer_states_are_as_accounted(n):
    layer = nn.Linear(n, 1, bias=False)
    optimizer = bnb.optim.AdamW8bit(layer.parameters())
    layer.weight.grad = torch.ones(1, n)
    optimizer.step()
    (state,) = optimizer.state.values()
    held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2") if key in state)
    assert OPTIMIZERS["adamw_8bit"][0](n, 4) == held
