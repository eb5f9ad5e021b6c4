"""Gradient checkpointing of both kinds, against the same step without."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_those_without_it(use_reentrant, make_any_config, trained, gradients, token_ids):
    model = trained(make_any_config(lora_dropout=0.2)).train()
    batch = {"input_ids": token_ids, "labels": token_ids}
    torch.manual_seed(6)
    expected = gradients(model, **batch)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(6)  # the same dropout
    actual = gradients(model, **batch)
    assert calls == [not use_reentrant, True]  # computed again in the backward pass
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        size = expected[name].abs().max()
        assert size > 0
        assert (value - expected[name]).abs().max() <= 1e-6 * size, name
