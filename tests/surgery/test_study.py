"""A study's numbers are those of separate edits; nothing of it stays in the adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import evaluation
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.surgery import reweight, study
from lorakit.surgery._study import drawn_examples

D = 10


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean((1, 2))


def rows(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, D, generator=generator), torch.randn(n, 3, D, generator=generator)


def batches(seed, n, size=4, chosen=None):
    x, y = rows(seed, n)
    if chosen is not None:
        x, y = x[chosen], y[chosen]
    return [{"x": a, "y": b} for a, b in zip(x.split(size), y.split(size), strict=True)]


def task(seed, name):
    def score(model):
        return torch.cat([-loss_fn(model, batch) for batch in batches(seed, 12)])

    return evaluation.function(score, name=name)


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    return adapted.eval()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OPTIONS = {"loss_fn": loss_fn, "progress": False}
SETS = {"both": ["0", "2"], "last": ["2"]}
POLICIES = ("abs_select", "grad_direction", "random_index")


def run(model, **options):
    settings = {"task": task(7, "own"), "guards": [task(8, "other")], "module_sets": SETS, "policies": POLICIES}
    settings |= {"seeds": (0, 1), "sizes": (5, 12), "energies": ("l1", "none")}
    return study(model, batches(1, 12), **OPTIONS | settings | options)


@pytest.mark.slow
def test_its_numbers_are_those_of_separate_edits(model):
    before = state_of(model)
    report = run(model)
    assert same(model, before)
    assert len(report.edits) == 3 * 2 * 2 * 2 * 2
    assert len(report.controls) == 20 * 2 * 2
    plain = {name: -torch.cat([loss_fn(model, b) for b in batches(s, 12)]) for name, s in (("own", 7), ("other", 8))}
    for one in [*report.edits, *report.controls[::9]]:
        chosen = list(one.examples)
        assert len(chosen) == one.num_examples
        calibration = batches(1, 12, chosen=chosen)
        options = {"target_modules": SETS[one.modules], "num_examples": len(chosen), "seed": one.seed}
        edit = reweight(model, calibration, policy=one.policy, preserve_energy=one.energy, **options, **OPTIONS)
        for name, seed, found in (("own", 7, one.gain), ("other", 8, one.guard_changes["other"])):
            scores = -torch.cat([loss_fn(model, b) for b in batches(seed, 12)])
            assert found == pytest.approx((scores - plain[name]).detach().double().mean().item(), rel=1e-3, abs=1e-5)
        edit.undo()
    assert max(abs(one.gain) for one in report.edits) > 1e-3
    json.dumps(report.to_dict(), allow_nan=False)
    assert len(report.rows()) == len(report.edits) + len(report.controls)
    assert 1 / 21 <= report.p_value(report.edits[0]) <= 1
    report.plot()
    assert "edits gain" in str(report)
    assert run(model).edits == report.edits


def test_one_pass_calibrates_all_edits(model, monkeypatch):
    from lorakit.surgery import _study

    calls = []
    measure = _study.measure
    monkeypatch.setattr(_study, "measure", lambda *a, **k: calls.append(1) or measure(*a, **k))
    run(model)
    assert len(calls) == 1


def test_a_seed_draws_examples_and_all_of_them_are_in_order():
    assert drawn_examples(3, 6, 6) == list(range(6))
    draws = {tuple(drawn_examples(seed, 3, 20)) for seed in range(10)}
    assert len(draws) > 5
    assert all(len(set(draw)) == 3 and max(draw) < 20 for draw in draws)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 20])
def test_whatever_is_raised_the_adapter_is_as_it_was(model, fails_at):
    before, calls = state_of(model), []

    def score(model):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return torch.arange(4.0)

    with pytest.raises(KeyboardInterrupt):
        run(model, task=evaluation.function(score, name="own"))
    assert same(model, before)


def test_what_cannot_be_asked(model):
    for options, error, message in (
        ({"controls": 19}, ValueError, "`controls` must be"),
        ({"sizes": ()}, ValueError, "must not be empty"),
        ({"energies": ("l3",)}, ValueError, "`energies` must be of"),
        ({"sizes": (99,)}, SurgeryError, "has 12"),
        ({"task": [task(7, "a"), task(7, "b")]}, EvaluationError, "`task` must be one task"),
    ):
        with pytest.raises(error, match=message):
            run(model, **options)
