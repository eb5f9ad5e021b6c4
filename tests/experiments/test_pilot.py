"""Pilots against dense float64 references; the model is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit.allocation import allocate
from lorakit.errors import CalibrationError, UnsupportedModelError
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


def accumulated(model, batches, name):
    """G of one module, by autograd on its weight."""
    total = sum(model(**batch).loss for batch in batches)
    return torch.autograd.grad(total, model.get_submodule(name).weight)[0]


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_full_width_sketch_is_the_accumulated_gradient(regression, batches, name):
    start = state(regression)
    report = pilot.gradient_subspaces(regression, batches, num_batches=4, rank=6, progress=False)
    assert_same(start, state(regression))
    G = accumulated(regression, batches, name).numpy()
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    row = next(row for row in report.modules if row.module_name == name)
    np.testing.assert_allclose(row.singular_values, S, rtol=1e-8)
    found_U, found_V = (basis.numpy() for basis in report.bases[name])
    np.testing.assert_allclose(found_U @ np.diag(S) @ found_V.T, G, atol=1e-8 * S[0])
    assert "directions hold" in report.headline
    assert "bases" not in report.to_dict()


def test_a_sketch_finds_the_leading_subspace_of_a_gradient_of_falling_spectrum():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(60, 50, bias=False)).double()
    scale = torch.cat([torch.full((4,), 10.0), torch.full((56,), 0.01)]).double()
    batches = [(torch.randn(30, 60).double() * scale, torch.randn(30, 50).double()) for _ in range(3)]

    def loss_fn(model, batch):
        return (model(batch[0]) * batch[1]).sum()

    report = pilot.gradient_subspaces(
        model, batches, num_batches=3, rank=4, oversampling=4, modules=["0"], loss_fn=loss_fn, progress=False
    )
    G = sum(targets.mT @ x for x, targets in batches).numpy()
    U, S, Vh = np.linalg.svd(G)
    found_U, found_V = (basis.numpy() for basis in report.bases["0"])
    assert np.linalg.svd(U[:, :4].T @ found_U, compute_uv=False).min() > 0.999
    assert np.linalg.svd(Vh[:4] @ found_V, compute_uv=False).min() > 0.999
    np.testing.assert_allclose(report.modules[0].singular_values, S[:4], rtol=1e-2)
    assert report.modules[0].norm == pytest.approx(np.linalg.norm(G), rel=1)


def test_a_sketch_runs_on_a_language_model(tiny_llama):
    model, ids = tiny_llama(), torch.arange(12).reshape(1, 12)
    report = pilot.gradient_subspaces(
        model, [{"input_ids": ids, "labels": ids}], num_batches=1, rank=32, progress=False
    )
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    for row in report.modules:
        dense = model.get_submodule(row.module_name).weight.grad
        U, V = report.bases[row.module_name]
        assert (U.mT @ dense @ V).norm() == pytest.approx(dense.norm().item(), rel=1e-3)


def test_a_sketch_refuses_empty_loaders(regression):
    with pytest.raises(CalibrationError, match="`loader` must yield"):
        pilot.gradient_subspaces(regression, [], num_batches=1, progress=False)
