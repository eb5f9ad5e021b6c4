"""Every pilot over hostile data and models: an error that says what was wrong, and the model bit for bit as before."""

from __future__ import annotations

import contextlib

import pytest
import torch
from attacks import cases
from peft import LoraConfig, get_peft_model

from lorakit.experiments import pilot

MODULE = "model.layers.1.self_attn.v_proj"
GOOD = [{"input_ids": [[1, 2, 3, 4, 5, 6]], "labels": [[1, 2, 3, 4, 5, 6]]}] * 2
TRAINING = {"steps": 2, "batch_size": None, "learning_rate": 1e-2, "progress": False}
PILOTS = {
    "update_spectra": lambda model, data: pilot.update_spectra(model, data, **TRAINING),
    "gradient_subspaces": lambda model, data: pilot.gradient_subspaces(
        model, data, num_batches=2, rank=2, progress=False
    ),
    "hessian_of_a_module": lambda model, data: pilot.hessian_spectrum(
        model, data, num_batches=2, k=1, module=MODULE, tol=0.1
    ),
    "hessian_of_an_adapter": lambda model, data: pilot.hessian_spectrum(model, data, num_batches=2, k=1, tol=0.1),
}


def batches(data):
    """The batches of a case, with lists of lists as tensors."""

    def batch(given):
        return {key: torch.tensor(value) for key, value in given.items()} if isinstance(given, dict) else given

    return [batch(one) for one in data] if isinstance(data, list) else data


def model_of(tiny_llama, name, case):
    """A case's model, partly in train mode and partly frozen, so that both must be restored."""
    made = case.get("model")
    with torch.inference_mode() if made == "inference" else contextlib.nullcontext():
        model = tiny_llama()
        if name == "hessian_of_an_adapter":
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    if "weight" in case:
        with torch.no_grad():
            base = model.get_submodule(f"{'base_model.model.' * hasattr(model, 'peft_config')}{MODULE}").weight
            base[0, 0] = float(case["weight"])
    if made == "meta":
        model.to("meta")
    model.train()
    next(model.modules()).training = False
    next(model.parameters()).requires_grad_(False)
    return model


def state(model):
    values = {name: value if value.is_meta else value.clone().view(torch.uint8) for name, value in _tensors(model)}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return values, (flags, modes), torch.get_rng_state()


def _tensors(model):
    return ((name, value.detach()) for name, value in model.state_dict().items())


def assert_as_before(model, before):
    after = state(model)
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert value.is_meta or torch.equal(value, after[0][name]), name
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PILOTS))
@pytest.mark.parametrize("case", cases("pilots"), ids=lambda case: case["id"])
def test_pilots_say_what_is_wrong_and_leave_the_model_alone(tiny_llama, name, case):
    model = model_of(tiny_llama, name, case)
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=case["message"]):
        PILOTS[name](model, batches(case.get("data", GOOD)))
    assert_as_before(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PILOTS))
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_pilots_are_the_same_in_any_mode(tiny_llama, name, mode):
    model = model_of(tiny_llama, name, {})
    before, data = state(model), batches(GOOD)
    expected = PILOTS[name](model, data)
    with mode():
        found = PILOTS[name](model, data)
    assert found.to_dict() == expected.to_dict()
    assert_as_before(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PILOTS))
def test_pilots_that_are_stopped_leave_the_model_alone(tiny_llama, name):
    class Stopping(list):
        def __getitem__(self, i):
            raise KeyboardInterrupt

        def __iter__(self):
            yield batches(GOOD)[0]
            raise KeyboardInterrupt

    model = model_of(tiny_llama, name, {})
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        PILOTS[name](model, Stopping(GOOD))
    assert_as_before(model, before)
