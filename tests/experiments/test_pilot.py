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
    options = {
        "steps": 5,
        "batch_size": None,
        "learning_rate": 0.01,
        "schedule": "constant",
        "warmup_steps": 0,
        "rank": 2,
    }
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
    for name, module in (("first", regression.first), ("second", regression.second)):
        change = module.weight.detach().numpy() - start[0][f"{name}.weight"].numpy()
        dense_U, _, dense_Vh = np.linalg.svd(change)
        found_U, found_V = (part.numpy() for part in report.bases[name])
        assert found_U.shape[1] == found_V.shape[1] == 2
        assert np.linalg.svd(dense_U[:, :2].T @ found_U, compute_uv=False) == pytest.approx([1, 1], abs=1e-9)
        assert np.linalg.svd(dense_Vh[:2] @ found_V, compute_uv=False) == pytest.approx([1, 1], abs=1e-9)
    assert "bases" not in report.to_dict()["summary"]
    assert report.description == "leading subspaces of rank 2 of ΔW after 5 steps of full fine-tuning (seed 0)"
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


def dense_hessian(model, batches, names):
    """The Hessian of the mean loss by torch.func, and its gradient, over the named parameters."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [values[name].shape for name in names]

    def loss(flat):
        pieces = flat.split([shape.numel() for shape in shapes])
        new = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        total = sum(torch.func.functional_call(model, {**values, **new}, kwargs=batch).loss for batch in batches)
        return total / len(batches)

    flat = torch.cat([values[name].flatten() for name in names])
    return torch.func.hessian(loss)(flat).numpy(), torch.func.grad(loss)(flat).numpy()


def assert_is_spectrum(report, H, g):
    values, vectors = np.linalg.eigh(H)
    found = [pair.eigenvalue for pair in report.pairs]
    np.testing.assert_allclose(found, values[::-1][: len(found)], rtol=1e-6)
    assert report.smallest.eigenvalue == pytest.approx(values[0], rel=1e-6, abs=1e-9)
    assert report.smoothness == pytest.approx(np.abs(values).max(), rel=1e-6)
    shares = (vectors.T @ g)[::-1][: len(found)] ** 2 / (g @ g)
    np.testing.assert_allclose([pair.gradient_share for pair in report.pairs], shares, rtol=1e-4, atol=1e-8)
    assert report.gradient_norm == pytest.approx(np.linalg.norm(g))


def test_eigenpairs_of_a_modules_hessian(regression, batches):
    start = state(regression)
    report = pilot.hessian_spectrum(regression, batches, num_batches=4, k=3, module="first", tol=1e-10)
    assert_same(start, state(regression))
    assert_is_spectrum(report, *dense_hessian(regression, batches, ["first.weight"]))
    assert (report.of, report.num_numbers, report.num_batches) == ("first", 30, 4)
    assert "first: Hessian eigenvalues" in report.headline


def test_eigenpairs_of_an_adapters_hessian(regression, batches):
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(regression, config).double()
    start = state(model)
    report = pilot.hessian_spectrum(model, batches, num_batches=4, k=2, tol=1e-10)
    assert_same(start, state(model))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert_is_spectrum(report, *dense_hessian(model, batches, names))
    assert report.of == "adapter"
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    again = pilot.hessian_spectrum(model, batches, num_batches=4, k=2, tol=1e-10, adapter_name="default")
    assert [pair.eigenvalue for pair in again.pairs] == pytest.approx([pair.eigenvalue for pair in report.pairs])
    assert model.active_adapters == ["other"]


def test_a_hessian_of_a_language_model_and_its_limits(tiny_llama, monkeypatch):
    from lorakit.experiments.pilot import _hessian

    model, ids = tiny_llama(torch.float64), torch.arange(12).reshape(1, 12)
    batches, name = [{"input_ids": ids, "labels": ids}], "model.layers.0.self_attn.v_proj"
    report = pilot.hessian_spectrum(model, batches, num_batches=1, k=1, module=name, tol=1e-6)
    assert report.pairs[0].residual < 1e-4 * report.smoothness
    monkeypatch.setattr(_hessian, "MAX_NUMBERS", 100)
    with pytest.raises(ValueError, match=f"The Hessian of '{name}' is of 512 numbers; at most 100"):
        pilot.hessian_spectrum(model, batches, num_batches=1, module=name)
