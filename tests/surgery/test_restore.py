"""Intruder directions are shrunk as far as the task allows, and only if base text gains."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import evaluation
from lorakit.errors import EvaluationError
from lorakit.spectral._intruders import intruder_vectors
from lorakit.surgery import refine

D = 32


@pytest.fixture
def intruded():
    """W has a spectrum; ΔW has an intruder u vᵀ of size 5 and a small part that resembles W's first direction."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(D, D, generator=generator))[0] for _ in range(2))
    W = U @ torch.diag(torch.linspace(2, 0.1, D)) @ V.T
    u = nn.functional.normalize(U.sum(1), dim=0)  # |cos| with each of W's is 1/√32
    v = V[:, -1]
    model = get_peft_model(
        nn.Sequential(nn.Linear(D, D, bias=False)), LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    layer.base_layer.weight.data = W.clone()
    layer.lora_B["default"].weight.data = torch.stack([5 * u, U[:, 0]], 1)
    layer.lora_A["default"].weight.data = torch.stack([v, V[:, 0]])
    return model, W, u, v


def task(right, inputs, name):
    def score(model):
        with torch.no_grad():
            return -(model(inputs) - inputs @ right.T).square().mean(1)

    return evaluation.function(score, name=name)


def inputs(seed, n=40):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def run(model, own, text, **options):
    settings = {"target_modules": ["0"], "progress": False, "margin": 0.01, "objective": "restore"}
    return refine(model, None, task=own, base_text=text, **settings | options)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_intruder_found_is_the_one_that_was_built_in(intruded):
    model, W, u, _ = intruded
    layer = model.base_model.model[0]
    tuned = W + layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
    Q = intruder_vectors(W, tuned, top_k=10, below=0.5)
    left, _, right = torch.linalg.svd(tuned.double())
    cosines = (torch.linalg.svd(W.double())[0].T @ left[:, :10]).abs().amax(0)
    assert Q.shape[1] == int((cosines < 0.5).sum()) == 1
    assert abs(float(Q[:, 0] @ u)) > 0.95


def test_an_intruder_that_the_task_does_not_need_is_taken_out(intruded):
    model, W, _, v = intruded
    before = state_of(model)
    x = inputs(1)
    x -= (x @ v)[:, None] * v  # the task does not use the intruder's input
    layer = model.base_model.model[0]
    right = W + layer.lora_B["default"].weight.data[:, 1:] @ layer.lora_A["default"].weight.data[1:]
    report = run(model, task(right, x, "own"), task(W, inputs(2), "text"), margin=0.05)
    assert (report.kept, report.verdict, report.intruders) == (True, "PASS", {"0": 1})
    assert [point.scale for point in report.frontier] == [0.75, 0.5, 0.25, 0.0]
    assert report.scale == max(report.frontier, key=lambda p: p.base_text.lower).scale
    tuned = before["base_model.model.0.lora_B.default.weight"], before["base_model.model.0.lora_A.default.weight"]
    Q = intruder_vectors(W, W + tuned[0] @ tuned[1], top_k=10, below=0.5)
    expected = tuned[0] - (1 - report.scale) * Q @ (Q.T @ tuned[0])
    assert torch.allclose(layer.lora_B["default"].weight, expected, atol=1e-5)
    assert torch.equal(layer.lora_A["default"].weight, tuned[1])
    json.dumps(report.to_dict(), allow_nan=False)
    assert len(report.rows()) == 4
    report.plot()
    report.undo()
    assert same(model, before)


def test_an_intruder_that_the_task_needs_stays_bit_for_bit(intruded):
    model, W, _, _ = intruded
    layer = model.base_model.model[0]
    right = W + layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
    before = state_of(model)
    report = run(model, task(right, inputs(1), "own"), task(W, inputs(2), "text"))
    assert (report.kept, report.verdict, len(report.reasons)) == (False, "FAIL", 1)
    assert same(model, before)
    assert len(report.frontier) == 4


def test_an_adapter_without_intruders_is_left_alone(intruded):
    model, W, _, _ = intruded
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data[:, 0] = 0
    before = state_of(model)
    report = run(model, task(W, inputs(1), "own"), task(W, inputs(2), "text"))
    assert (report.kept, report.intruders, report.frontier) == (False, {}, ())
    assert same(model, before)


@pytest.mark.parametrize("fails_at", range(1, 11))
def test_whatever_is_raised_the_adapter_is_as_it_was(intruded, fails_at):
    model, W, _, _ = intruded
    before, calls = state_of(model), []

    def score(model):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return torch.arange(4.0)

    tasks = [evaluation.function(score, name=name) for name in ("own", "text")]
    with pytest.raises(KeyboardInterrupt):
        run(model, *tasks)
    assert same(model, before)


def test_what_cannot_be_asked(intruded):
    model, W, _, _ = intruded
    own, text = task(W, inputs(1), "own"), task(W, inputs(2), "text")
    for options, error, message in (
        ({"base_text": None}, ValueError, "`base_text` is needed"),
        ({"base_text": own}, EvaluationError, "a name of its own"),
        ({"scales": (1.5,)}, ValueError, "`scales` must be in"),
        ({"objective": "both"}, ValueError, '"improve" or "restore"'),
    ):
        with pytest.raises(error, match=message):
            refine(model, None, **{"task": own, "base_text": text, "objective": "restore"} | options)
