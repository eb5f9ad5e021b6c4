"""Which group of an optimizer each of our parameters gets: Trainer's weight decay, LoRA+ and LoRA-FA."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

from lorakit import SpecLoRAConfig

RATE = 1e-2


def groups_of(optimizer, model):
    """For each parameter's name, the group that it is in; no parameter may be in two, nor a stranger in any."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    members = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert len({name for name, _ in members}) == len(members)
    return dict(members)


def test_trainer_decays_every_trained_parameter(make_any_config, tiny_llama, examples, trainable, tmp_path):
    model = get_peft_model(tiny_llama(), make_any_config())
    arguments = TrainingArguments(tmp_path, weight_decay=0.1, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=examples)
    assert trainable(model).keys() <= set(trainer.get_decay_parameter_names(model))
    groups = groups_of(trainer.create_optimizer(), model)
    assert groups.keys() == trainable(model).keys()
    assert {group["weight_decay"] for group in groups.values()} == {0.1}


def test_weight_decay_pulls_d_towards_one(trained):
    model = trained(SpecLoRAConfig(k=8, target_modules=["q_proj"]))
    mask = model.base_model.model.model.layers[0].self_attn.q_proj.lora_spec["default"]
    d = 1 + mask.weight.detach().double()
    mask.weight.grad = torch.zeros_like(mask.weight)
    torch.optim.AdamW([mask.weight], lr=RATE, weight_decay=0.5).step()
    torch.testing.assert_close(1 + mask.weight.detach().double(), d + 0.5 * RATE * (1 - d), rtol=0, atol=1e-7)


def test_loraplus_trains_d_at_the_rate_of_b(make_any_config, trained, trainable, gradients, token_ids):
    # PEFT counts every one-dimensional parameter to the group of B, and by LoRA+'s own argument d belongs there: a step
    # of d_i changes output i by the step times one entry of P x, while the steps of A add up over the input's width.
    model = trained(make_any_config())
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    groups = groups_of(optimizer, model)
    assert groups.keys() == trainable(model).keys()
    for name, group in groups.items():
        assert group["lr"] == pytest.approx(RATE * (1 if ".lora_A." in name else 16)), name
        assert group["weight_decay"] == 0.1
    before = trainable(model)
    gradients(model, input_ids=token_ids, labels=token_ids)
    optimizer.step()
    for name, value in trainable(model).items():
        assert not torch.equal(value, before[name]), name


def lorafa(model):
    return create_lorafa_optimizer(model, r=6, lora_alpha=12, lr=RATE)


# PEFT's optimizer asks for `x.T` of d before it fails.
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_lorafa_needs_another_name_for_d(trained, token_ids):
    # It takes any two parameters in a row whose names contain "lora" for an A and a B (and so fails with LoRA's own
    # `lora_bias`, too); all others it trains with AdamW.
    model = trained(SpecLoRAConfig(r=6, k=8, target_modules=["q_proj", "v_proj"]))
    optimizer = lorafa(model)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    with pytest.raises(TypeError, match="unsupported operand"):
        optimizer.step()


def test_lorafa_trains_b_and_d_and_leaves_a(make_any_config, trained, token_ids):
    model = trained(make_any_config())
    optimizer = lorafa(model)
    for group in optimizer.param_groups:
        group["names"] = [name.replace(".lora_spec.", ".spec.") for name in group["names"]]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    for name, value in before.items():
        if ".lora_spec." in name:  # the first step of Adam, as the optimizer writes it
            gradient = model.get_parameter(name).grad
            expected = value - RATE * gradient / (gradient.abs() + 1e-6 / (1 - 0.999) ** 0.5)
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(after[name], value) == (".lora_B." not in name and ".lora_spec." not in name), name
