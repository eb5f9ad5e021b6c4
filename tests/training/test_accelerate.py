"""accelerate's prepare, unwrap_model, save_state and load_state."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from closeness import assert_close_outputs
from peft import get_peft_model


@pytest.fixture
def make_accelerator():
    """Makes accelerators of any precision: without this the first in the process decides for all."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


def train(accelerator, model, optimizer, ids, steps):
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_unwrapped_and_saved_loads(
    precision, make_accelerator, make_any_config, tiny_llama, trainable, load, token_ids, tmp_path
):
    accelerator = make_accelerator(mixed_precision=precision)
    model = get_peft_model(tiny_llama(), make_any_config())
    before = trainable(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = train(accelerator, model, optimizer, token_ids, 2)
    assert losses[1] < losses[0]
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for name, value in trainable(unwrapped).items():
        assert not torch.equal(value, before[name]), name
    unwrapped.save_pretrained(tmp_path, save_function=accelerator.save, state_dict=accelerator.get_state_dict(model))
    expected = unwrapped.eval()(input_ids=token_ids).logits
    assert_close_outputs(load(tmp_path)(input_ids=token_ids).logits, expected)


def test_a_saved_state_is_gone_on_with(make_accelerator, make_config, tiny_llama, token_ids, tmp_path):
    def start():
        accelerator = make_accelerator()
        model = get_peft_model(tiny_llama(), make_config(lora_dropout=0.1))
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    accelerator, *rest = start()
    train(accelerator, *rest, token_ids, 2)
    accelerator.save_state(tmp_path)
    expected = train(accelerator, *rest, token_ids, 2)
    torch.manual_seed(7)
    accelerator, *rest = start()
    accelerator.load_state(tmp_path)
    assert train(accelerator, *rest, token_ids, 2) == pytest.approx(expected, abs=1e-6)
