"""Pilots against dense float64 references; the model is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit.allocation import allocate
from lorakit.errors import UnsupportedModelError
from lorakit.experiments import pilot


class Regression(nn.Module):
    """Two linear modules with a smooth activation, and the squared error as loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, labels):
        y = self.second(torch.tanh(self.first(x)))
        return Output((y - labels).square().sum(-1).mean())


class Output:
    def __init__(self, loss):
        self.loss = loss


@pytest.fixture
def regression():
    return Regression().double()


@pytest.fixture
def batches():
    return [{"x": torch.randn(7, 6).double(), "labels": torch.randn(7, 3).double()} for _ in range(4)]


def state(model):
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return {k: v.clone() for k, v in model.state_dict().items()}, flags, model.training, torch.get_rng_state()


def assert_same(before, after):
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def test_update_spectra_are_those_of_a_full_fine_tuning(regression, batches):
    start = state(regression)
    options = {"steps": 5, "batch_size": None, "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0}
    report = pilot.update_spectra(regression, batches[:1], **options, progress=False)
    assert_same(start, state(regression))

    old = regression.first.weight.detach().numpy().copy()
    optimizer = torch.optim.AdamW(regression.parameters(), lr=0.01, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        regression(**batches[0]).loss.backward()
        nn.utils.clip_grad_norm_(regression.parameters(), 1.0)
        optimizer.step()
    sigma = np.linalg.svd(regression.first.weight.detach().numpy() - old, compute_uv=False)
    row = report.modules[0]
    assert row.module_name == "first"
    np.testing.assert_allclose(row.singular_values, sigma, atol=1e-7 * sigma[0])
    np.testing.assert_allclose(row.energy, np.cumsum(sigma**2) / np.sum(sigma**2), atol=1e-7)
    assert report.allocate(30).ranks == allocate(report.spectra, report.costs, 30).ranks
    assert "5 steps" in report.headline


def test_update_spectra_restores_a_model_whose_training_fails(regression, batches):
    start = state(regression)
    wrong = [batches[0], {**batches[0], "x": torch.zeros(7, 2).double()}]
    with pytest.raises(RuntimeError):
        pilot.update_spectra(regression, wrong, steps=6, batch_size=None, learning_rate=0.1, progress=False)
    assert_same(start, state(regression))


def test_update_spectra_refuses_what_it_cannot_train(regression, batches):
    options = {"steps": 1, "batch_size": None, "learning_rate": 0.1, "progress": False}
    with pytest.raises(UnsupportedModelError, match="float32 or float64"):
        pilot.update_spectra(regression.bfloat16(), batches, **options)
    with pytest.raises(ValueError, match="`modules` must name linear modules"):
        pilot.update_spectra(regression.double(), batches, modules=["third"], **options)
    adapted = get_peft_model(regression, LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(UnsupportedModelError, match="has adapters"):
        pilot.update_spectra(adapted, batches, **options)
