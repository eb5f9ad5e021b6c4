"""An edit is kept only where it is better than the adapter and than chance; else nothing has changed."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import evaluation
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.surgery import POLICIES, GradDirection, RefineReport, refine, reweight
from lorakit.surgery._refine import Strengthened

D = 12


def squared_error(model, batch):
    """Per example: the mean squared distance from the right answer, which is W₀ x + Δ x."""
    return (model(batch["x"]) - batch["y"]).square().mean((1, 2))


def data(seed, right, count=64, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, D, generator=generator)
    y = x @ right.T + noise * torch.randn(count, 3, D, generator=generator)
    return [{"x": a, "y": b} for a, b in zip(x.split(8), y.split(8), strict=True)]


class Task:
    """Minus the squared error on documents of its own."""

    cacheable, margin = False, None

    def __init__(self, batches, name="held-out"):
        self.batches, self.name, self.calls = batches, name, 0

    def fingerprint(self):
        return self.name

    def score(self, model, tokenizer, *, limit, progress):
        from lorakit.evaluation._task_kinds import Scored

        self.calls += 1
        with torch.no_grad():
            scores = [-v for batch in self.batches for v in squared_error(model, batch).tolist()]
        return Scored([f"{self.name} {i}" for i in range(len(scores))], scores, {})


@pytest.fixture
def harmful():
    """A linear model whose adapter has 6 components of which 2 are right and 4 do harm."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(D, D, bias=False)), LoraConfig(r=6, lora_alpha=6, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    U, _, V = torch.linalg.svd(torch.randn(D, D))
    sigma = torch.tensor([2.0, 1.8, 1.6, 1.4, 1.2, 1.0])
    layer.lora_B["default"].weight.data = U[:, :6] * sigma.sqrt()
    layer.lora_A["default"].weight.data = sigma.sqrt()[:, None] * V[:6]
    right = layer.base_layer.weight.data + (U[:, [1, 3]] * torch.tensor([2.4, 2.0])) @ V[[1, 3]]
    return model, right


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OPTIONS = {"target_modules": ["0"], "loss_fn": squared_error, "progress": False, "preserve_energy": "none"}
OPTIONS |= {"num_examples": 24, "num_selection": 24}


def test_an_edit_that_removes_harm_is_kept_and_can_be_undone_and_saved(harmful, tmp_path):
    model, right = harmful
    before = weights(model)
    task = Task(data(1, right, 128))
    report = refine(model, data(0, right), task=task, policies=["grad_direction"], strengths=(0.5, 1), **OPTIONS)
    assert isinstance(report, RefineReport)
    assert report.kept
    assert report.verdict == "PASS"
    assert report.reasons == ()
    assert report.p_value == 1 / 20
    assert len(report.controls) == 19
    assert task.calls == 1 + 1 + 19
    assert report.task.lower > 0
    # What was certified is what the model now does, and its controls are other edits.
    scores = [-v for batch in task.batches for v in squared_error(model, batch).tolist()]
    assert list(report.task.candidate_scores[0]) == pytest.approx(scores, rel=1e-5)
    assert max(report.controls) < report.task.difference
    # The same edit by `reweight` on the calibration examples alone.
    after = weights(model)
    report.save(tmp_path / "out")
    report.undo()
    assert same(model, before)
    policy = Strengthened(GradDirection(), report.strength)
    reweight(model, data(0, right)[:3], policy=policy, **{k: v for k, v in OPTIONS.items() if k != "num_selection"})
    for name, value in model.state_dict().items():
        assert torch.allclose(value, after[name], atol=1e-6)
    assert json.loads((tmp_path / "out" / "lorakit_surgery.json").read_text())["edits"]
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.plot().axes
    assert [row["strength"] for row in report.rows()] == [0.5, 1.0]
    assert "is kept" in report.headline


def test_an_adapter_that_is_right_stays_bit_for_bit_as_it_was(harmful):
    model, _ = harmful
    layer = model.base_model.model[0]
    right = layer.base_layer.weight.data + layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
    before = weights(model)
    report = refine(model, data(0, right), task=Task(data(1, right, 128)), **OPTIONS)
    assert not report.kept
    assert same(model, before)
    assert report.reasons
    assert report.verdict in ("FAIL", "INCONCLUSIVE")
    with pytest.raises(SurgeryError, match="nothing to be undone"):
        report.undo()
    with pytest.raises(SurgeryError, match="nothing to be saved"):
        report.save("anywhere")


def test_a_guard_that_becomes_worse_refuses_the_edit(harmful):
    model, right = harmful
    layer = model.base_model.model[0]
    now = layer.base_layer.weight.data + layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
    before = weights(model)
    guard = Task(data(3, now, 64), name="what it could do")
    settings = {"policies": ["grad_direction"], "strengths": (1,), **OPTIONS}
    report = refine(model, data(0, right), task=Task(data(1, right, 128)), guards=[guard], **settings)
    assert not report.kept
    assert report.verdict == "FAIL"
    assert any("guard what it could do is FAIL" in reason for reason in report.reasons)
    assert same(model, before)


def test_few_documents_are_inconclusive(harmful):
    model, right = harmful
    before = weights(model)
    few = Task(data(1, right, 2, noise=8.0))
    report = refine(model, data(0, right), task=few, policies=["grad_direction"], strengths=(1,), **OPTIONS)
    assert (report.kept, report.verdict) == (False, "INCONCLUSIVE")
    assert same(model, before)


def test_the_controls_are_the_chosen_gates_in_another_order(harmful, monkeypatch):
    from lorakit.surgery import _refine

    model, right = harmful
    seen = []
    plan_of = _refine.plan_of

    def watched(*args):
        plan = plan_of(*args)
        seen.append([row.gate for row, _ in plan])
        return plan

    monkeypatch.setattr(_refine, "plan_of", watched)
    settings = {"policies": ["grad_direction"], "strengths": (1,), **OPTIONS}
    report = refine(model, data(0, right), task=Task(data(1, right)), **settings)
    assert report.kept
    (chosen,) = (row.gate for row in report.edit.modules)
    assert len(seen) == 19
    for (gate,) in seen:
        assert sorted(gate) == pytest.approx(sorted(chosen))
    assert len({tuple(gate) for (gate,) in seen}) > 15


@pytest.mark.parametrize("fails_at", range(1, 21))
def test_whatever_fails_the_adapter_is_as_it_was(harmful, fails_at):
    model, right = harmful
    before = weights(model)

    class Failing(Task):
        def score(self, *args, **options):
            if self.calls == fails_at:
                raise KeyboardInterrupt
            return super().score(*args, **options)

    settings = {"policies": ["grad_direction"], "strengths": (1,), **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        refine(model, data(0, right), task=Failing(data(1, right)), **settings)
    assert same(model, before)


def test_the_same_call_decides_the_same(harmful):
    model, right = harmful
    settings = {"policies": ["grad_direction", "random_index"], **OPTIONS}
    first = refine(model, data(0, right), task=Task(data(1, right)), **settings)
    if first.kept:
        first.undo()
    second = refine(model, data(0, right), task=Task(data(1, right)), **settings)
    assert first.controls == second.controls
    assert first.candidates == second.candidates
    assert len(first.candidates) == 6


def test_examples_of_selection_may_be_given(harmful):
    model, right = harmful
    settings = {"policies": ["grad_direction"], **OPTIONS}
    report = refine(model, data(0, right), task=Task(data(1, right)), selection=data(5, right, 40), **settings)
    assert (report.num_examples, report.num_selection) == (24, 24)
    with pytest.raises(EvaluationError, match="24 documents are in calibration and in selection"):
        refine(model, data(0, right), task=Task(data(1, right)), selection=data(0, right), **settings)
    with pytest.raises(SurgeryError, match="must have more than 64 examples"):
        refine(model, data(0, right), task=Task(data(1, right)), **settings | {"num_examples": 64})


@pytest.mark.slow
def test_documents_that_were_used_are_refused_and_tokens_are_calibrated_on(tiny_llama, randomize):
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    ids = torch.randint(1, 64, (48, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    before = weights(model)
    settings = {"num_examples": 12, "num_selection": 12, "progress": False, "policies": ["grad_direction"]}
    for used in (batches[1], batches[2]):
        with pytest.raises(EvaluationError, match="were used for calibration or selection"):
            refine(model, batches, task=evaluation.loss([used], name="used"), **settings)
    task = evaluation.loss(batches[3:], name="free")
    report = refine(model, batches, task=task, strengths=(1,), **settings)
    if report.kept:
        report.undo()
    assert same(model, before)
    assert report.num_selection == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": 18}, "`controls` must be at least 19"),
        ({"strengths": (0,)}, "`strengths` must be"),
        ({"policies": []}, "must not be empty"),
        ({"policies": ["best"]}, "`policy` must be one of"),
        ({"preserve_energy": "l3"}, "`preserve_energy` must be one of"),
        ({"num_selection": 0}, "`num_selection` must be"),
        ({"margin": 0}, "`margin` must be"),
    ],
)
def test_wrong_arguments(harmful, options, message):
    model, right = harmful
    task = Task(data(1, right))
    with pytest.raises((ValueError, EvaluationError), match=message):
        refine(model, data(0, right), task=task, **OPTIONS | options)
    assert task.calls == 0
    with pytest.raises(EvaluationError, match="`task` must be one task"):
        refine(model, data(0, right), task=[task, Task(data(2, right), name="other")], **OPTIONS)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.floats(0.1, 4), st.integers(0, 1000))
def test_a_strength_is_a_power_of_the_gate(name, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(7, generator=generator, dtype=torch.float64).sort(descending=True).values + 0.1
    g = torch.randn(7, generator=generator, dtype=torch.float64)
    policy = POLICIES[name]()
    once = policy(sigma, g, generator=torch.Generator().manual_seed(1))
    found = Strengthened(policy, strength)(sigma, g, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found, sigma * (once.clamp(min=0) / sigma) ** strength, rtol=1e-12)


def test_an_adapter_on_disk_is_refined_as_in_its_model(saved, tmp_path):
    task = evaluation.loss(saved["own"], name="own")
    settings = {"task": task, "num_examples": 6, "num_selection": 6, "strengths": (1,), "progress": False}
    settings["policies"] = ["grad_direction"]
    files = {path: path.read_bytes() for path in saved["adapter"].iterdir()}
    report = refine(saved["adapter"], saved["calibration"], base=saved["base"], **settings)
    model = evaluation.load_adapted(saved["base"], saved["adapter"])
    live = refine(model, saved["calibration"], tokenizer=saved["base"], **settings)
    assert (report.candidates, report.controls, report.reasons) == (live.candidates, live.controls, live.reasons)
    assert {path: path.read_bytes() for path in saved["adapter"].iterdir()} == files
    if report.kept:
        report.save(tmp_path / "out")
    else:
        with pytest.raises(SurgeryError, match="nothing to be saved"):
            report.save(tmp_path / "out")
    assert (tmp_path / "out").exists() == report.kept
    with pytest.raises(TypeError, match="`base` must be the path or Hub id"):
        refine(saved["adapter"], saved["calibration"], **settings)
