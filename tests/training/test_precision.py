"""Mixed precision: the dtypes of LoRA, and gradients near those of float32."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_outputs
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

# Relative to the norm of a parameter's gradient: bfloat16 has 8 bits, and the error goes through two layers.
TOLERANCE = {torch.bfloat16: 0.04, torch.float16: 0.005}


def dtypes(model, batch, dtype=None):
    """Dtypes of the trained parameters, of what each adapted layer returns, and of the logits."""
    found = {}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: output.dtype}))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        found["logits"] = model(**batch).logits.dtype
    for hook in hooks:
        hook.remove()
    return found, {p.dtype for p in model.parameters() if p.requires_grad}


def check_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert actual[name].isfinite().all(), name
        assert gradient.norm() > 0, name
        error = (actual[name].float() - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error:.3f}"


@pytest.fixture
def batch(token_ids):
    return {"input_ids": token_ids, "labels": token_ids}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_autocast_over_a_float32_base(dtype, make_any_config, make_lora, trained, gradients, batch):
    model = trained(make_any_config()).train()
    outputs, parameters = dtypes(model, batch, dtype)
    assert (outputs, parameters) == dtypes(trained(make_lora()).train(), batch, dtype)
    assert set(outputs.values()) == {dtype}
    expected = gradients(model, **batch)
    with torch.autocast("cpu", dtype=dtype):
        actual = gradients(model, **batch)
    assert {value.dtype for value in actual.values()} == {torch.float32}
    check_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bfloat16_base(autocast_adapter_dtype, autocast, make_any_config, make_lora, trained, gradients, batch):
    dtype = torch.bfloat16 if autocast else None
    model, lora = (
        trained(config, torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype).train()
        for config in (make_any_config(), make_lora())
    )
    outputs, parameters = dtypes(model, batch, dtype)
    assert (outputs, parameters) == dtypes(lora, batch, dtype)
    assert parameters == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        actual = gradients(model, **batch)
    expected = gradients(model.float(), **batch)
    check_close(actual, expected, 2 * TOLERANCE[torch.bfloat16])


def test_a_new_adapter_changes_nothing_under_autocast(make_any_config, tiny_llama, batch):
    base = tiny_llama()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = base(**batch).logits
        assert_close_outputs(get_peft_model(base, make_any_config()).eval()(**batch).logits, expected)
