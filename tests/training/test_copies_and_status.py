"""Copies of a model (deepcopy, pickle, moving averages), and what PEFT says about it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from closeness import assert_close_outputs
from peft import get_layer_status, get_model_status, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lorakit import SpecLoRAConfig


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # what was written two lines above


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), torch_saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_computes_the_same_and_is_independent(make_copy, make_any_config, trained, randomize, token_ids):
    model = trained(make_any_config())
    expected = model(input_ids=token_ids).logits
    other = make_copy(model)
    assert_close_outputs(other(input_ids=token_ids).logits, expected)
    assert {name: p.requires_grad for name, p in other.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    randomize(other, seed=8)
    assert not torch.allclose(other(input_ids=token_ids).logits, expected, atol=1e-3)
    assert_close_outputs(model(input_ids=token_ids).logits, expected)
    other.merge_and_unload()  # the copy's layers are whole
    assert_close_outputs(model(input_ids=token_ids).logits, expected)


def test_a_moving_average(make_any_config, trained, randomize, trainable, load, token_ids, tmp_path):
    model = trained(make_any_config())
    first = trainable(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)  # the first time, a copy
    second = trainable(randomize(model, seed=9))
    average.update_parameters(model)
    actual = trainable(average.module)
    assert actual.keys() == first.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name], rtol=0, atol=1e-6, msg=name)
    average.module.save_pretrained(tmp_path)
    assert_close_outputs(load(tmp_path)(input_ids=token_ids).logits, average(input_ids=token_ids).logits)


def test_the_count_of_trainable_parameters(make_any_config, tiny_llama, capsys):
    base, config = tiny_llama(), make_any_config()
    frozen = sum(p.numel() for p in base.parameters())
    q, v, down = (32, 32), (16, 32), (32, 48)  # the sides of each layer's weights
    ranks = (2, 6, 6) if config.peft_type == "FISHERLORA" else (6, 6, 6)
    of_d = 0 if config.peft_type == "FISHERLORA" else 3 * 8
    expected = 2 * (sum(r * sum(sides) for r, sides in zip(ranks, (q, v, down), strict=True)) + of_d)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,d} || all params: {frozen + expected:,d}" in capsys.readouterr().out
    status = get_model_status(model)
    assert (status.trainable_params, status.total_params) == (expected, frozen + expected)
    assert status.num_adapter_layers == 6


def test_status(make_any_config, trained):
    model = trained(make_any_config())
    model.add_adapter("second", make_any_config())
    kind = model.peft_config["default"].peft_type.value

    def seen():
        status = get_model_status(model)
        assert status.peft_types == {"default": kind, "second": kind}
        assert status.available_adapters == ["default", "second"]
        assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
        return status.enabled, status.active_adapters, status.requires_grad, status.merged_adapters

    only = {"default": {"default": True, "second": False}, "second": {"default": False, "second": True}}
    assert seen() == (True, ["default"], only["default"], [])
    model.set_adapter("second")
    assert seen() == (True, ["second"], only["second"], [])
    assert [layer.requires_grad for layer in get_layer_status(model)] == [only["second"]] * 6
    with model.disable_adapter():
        assert seen()[0] is False
    assert seen() == (True, ["second"], only["second"], [])
    model.merge_adapter()
    assert seen()[3] == ["second"]


def test_a_frozen_mask_is_seen(trained):
    model = trained(SpecLoRAConfig(k=8, target_modules=["q_proj"]))
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_spec["default"].requires_grad_(False)
    assert get_model_status(model).requires_grad == {"default": "irregular"}
