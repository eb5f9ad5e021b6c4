"""A study's numbers are those of separate edits; nothing of it stays in the adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import evaluation
from lorakit.errors import EvaluationError, PlanError, SurgeryError
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


class Counted:
    """A function task that counts its calls, and is interrupted at one of them."""

    def __init__(self, seed, fails_at=0):
        self.seed, self.calls, self.fails_at = seed, 0, fails_at

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return torch.cat([-loss_fn(model, batch) for batch in batches(self.seed, 12)])


def counted(seed, name, **options):
    function = Counted(seed, **options)
    return evaluation.function(function, name=name), function


SMALL = {"policies": ("abs_select", "grad_direction"), "sizes": (5, 12), "energies": ("l1",), "seeds": (0, 1)}


def test_an_interrupted_study_goes_on_where_it_was(model, tmp_path, monkeypatch):
    from lorakit.surgery import _study

    before = state_of(model)
    (own, calls), (other, _) = counted(7, "own"), counted(8, "other")
    whole = run(model, task=own, guards=[other], **SMALL)
    passes, measure = [], _study.measure
    monkeypatch.setattr(_study, "measure", lambda *a, **k: passes.append(1) or measure(*a, **k))
    (own, first), (other, _) = counted(7, "own", fails_at=10), counted(8, "other")
    with pytest.raises(KeyboardInterrupt):
        run(model, task=own, guards=[other], records=tmp_path, **SMALL)
    assert same(model, before)
    (own, second), (other, _) = counted(7, "own"), counted(8, "other")
    resumed = run(model, task=own, guards=[other], records=tmp_path, **SMALL)
    assert (resumed.edits, resumed.controls) == (whole.edits, whole.controls)
    assert first.calls - 1 + second.calls == calls.calls
    assert second.calls > 5
    assert len(passes) == 1
    (own, third), (other, fourth) = counted(7, "own"), counted(8, "other")
    again = run(model, task=own, guards=[other], records=tmp_path, alpha=0.1, **SMALL)
    assert third.calls == fourth.calls == 0
    assert again.estimated_seconds == again.seconds == 0
    assert [e.gain for e in again.edits] == [e.gain for e in whole.edits]
    assert all(a.lower > w.lower for a, w in zip(again.edits, whole.edits, strict=True))


def distinct(report):
    """How many edits and controls differ: at rank 4 there are few draws, and 12 examples are the same for all seeds."""
    return len({(one.gain, *one.guard_changes.values()) for one in (*report.edits, *report.controls)})


def test_a_larger_study_scores_only_what_is_new(model, tmp_path):
    one = SMALL | {"seeds": (0,), "records": tmp_path}
    (own, first), (other, _) = counted(7, "own"), counted(8, "other")
    small = run(model, task=own, guards=[other], **one)
    assert first.calls == 1 + distinct(small)
    (own, more), (other, _), (third, guard) = counted(7, "own"), counted(8, "other"), counted(9, "third")
    large = run(model, task=own, guards=[other, third], **one | {"seeds": (0, 1)})
    assert more.calls == distinct(large) - distinct(small) <= 2 * 2  # the other seed's draws of 5 examples
    assert guard.calls == 1 + distinct(large)
    fresh = run(model, task=own, guards=[other, third], **SMALL)
    assert (large.edits, large.controls) == (fresh.edits, fresh.controls)
    assert {e.gain for e in small.edits} <= {e.gain for e in large.edits}
    # another largest size is another pass, with other draws; controls do not depend on it
    (own, other_size), (other, _) = counted(7, "own"), counted(8, "other")
    settings = {"task": own, "guards": [other], "sizes": (5, 9), "module_sets": {"renamed": ["0", "2"]}}
    shorter = run(model, **one | settings)
    assert [e.gain for e in shorter.controls] == [e.gain for e in small.controls if e.modules == "both"]
    assert other_size.calls <= 4
    assert shorter.edits == run(model, **SMALL | settings | {"seeds": (0,)}).edits


def test_how_long_it_will_take_counts_equal_edits_once(model, capsys):
    report = run(model, progress=True, **SMALL)
    assert f"{2 * distinct(report)} scorings, about" in capsys.readouterr().err
    assert distinct(report) < len(report.edits) + len(report.controls)


def test_records_of_another_adapter_and_damaged_ones_are_refused(model, tmp_path):
    run(model, records=tmp_path, **SMALL)
    (saved,) = tmp_path.glob("*.safetensors")
    content = saved.read_bytes()
    saved.write_bytes(b"nothing")
    with pytest.raises(PlanError, match="cannot be read. Remove it"):
        run(model, records=tmp_path, **SMALL)
    saved.write_bytes(content)
    with torch.no_grad():
        model.base_model.model[0].lora_A["default"].weight[0, 0] += 1
    with pytest.raises(PlanError, match="has other settings: adapter"):
        run(model, records=tmp_path, **SMALL)


def test_the_figure_has_a_panel_for_each_guard(model):
    (own, _), (a, _), (b, _) = counted(7, "own"), counted(8, "a"), counted(9, "b")
    report = run(model, task=own, guards=[a, b], **SMALL)
    figure = report.plot()
    assert [axes.get_xlabel() for axes in figure.axes] == ["risk: drop on a", "risk: drop on b"]
    shown = sorted(float(x) for part in figure.axes[0].collections for x in part.get_offsets()[:, 0])
    assert shown == pytest.approx(sorted(-e.guard_changes["a"] for e in (*report.edits, *report.controls)))
    summary, edits = report.tables()
    assert [row[0] for row in summary.rows] == ["random controls", "abs_select", "grad_direction"]
    assert len(edits.rows) == len(report.edits)
    assert run(model, guards=(), **SMALL).plot().axes[0].get_ylabel() == "reward: gain on own"


def test_an_adapter_on_disk_is_studied_as_in_its_model(saved):
    settings = {"guards": [evaluation.loss(saved["other"], name="other")], "policies": ["smooth_abs"], "sizes": (6,)}
    task = evaluation.loss(saved["own"], name="own")
    files = {path: path.read_bytes() for path in saved["adapter"].iterdir()}
    report = study(saved["adapter"], saved["calibration"], base=saved["base"], task=task, progress=False, **settings)
    model = evaluation.load_adapted(saved["base"], saved["adapter"])
    live = study(model, saved["calibration"], task=task, progress=False, **settings)
    assert report.edits == live.edits
    assert {path: path.read_bytes() for path in saved["adapter"].iterdir()} == files
    with pytest.raises(TypeError, match="`base` must be the path or Hub id of the base model"):
        study(saved["adapter"], saved["calibration"], task=task)
    with pytest.raises(TypeError, match="`base` and `options` are for the path"):
        study(model, saved["calibration"], task=task, base=saved["base"])
