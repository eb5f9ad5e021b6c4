"""Intruder directions are shrunk as far as the task allows, and only if base text gains."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import evaluation
from lorakit.adapters.edit_log import read_edits
from lorakit.adapters.in_model import live_modules
from lorakit.errors import EvaluationError
from lorakit.spectral._intruders import intruder_vectors
from lorakit.surgery import refine, reweight
from lorakit.surgery._restore import other_directions

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
    assert report.p_value == 1 / 20
    assert len(report.controls) == 19
    assert max(control.lower for control in report.controls) < max(p.base_text.lower for p in report.frontier)
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


@pytest.fixture
def busy(intruded):
    """The same, with four more components of ΔW that resemble W's leading directions."""
    _, W, u, v = intruded
    U, _, Vh = torch.linalg.svd(W)
    model = get_peft_model(
        nn.Sequential(nn.Linear(D, D, bias=False)), LoraConfig(r=6, lora_alpha=6, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    layer.base_layer.weight.data = W.clone()
    layer.lora_B["default"].weight.data = torch.cat([5 * u[:, None], U[:, :5] * torch.linspace(1.5, 0.7, 5)], 1)
    layer.lora_A["default"].weight.data = torch.cat([v[None], Vh[:5]])
    return model, W


def update_of(model):
    layer = model.base_model.model[0]
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double()


def test_controls_shrink_other_components_by_the_same_scales(busy):
    model, W = busy
    before, seen = update_of(model), []

    def score(model):
        seen.append(update_of(model))
        return torch.arange(40.0) - 3 * float((seen[-1] @ intruder).norm()) + 1e-3 * torch.randn(40)

    U, S, Vh = torch.linalg.svd(before)
    Q = intruder_vectors(W, W + before.float(), top_k=10, below=0.5).double()
    intruder = Vh[int((Q.T @ U[:, :6]).abs().argmax())]
    own = evaluation.function(lambda model: torch.arange(4.0), name="own")
    report = run(model, own, evaluation.function(score, name="text"), controls=19, scales=(0.5, 0.25))
    assert report.kept
    assert len(seen) == 1 + 2 + 19 * 2  # as it is, the frontier, and each control at each scale
    gates = [torch.einsum("ik,ij,kj->k", U[:, :6], update, Vh[:6]) / S[:6] for update in seen]
    least = int((Q.T @ U[:, :6]).abs().argmax())
    drawn = set()
    for place, gate in enumerate(gates[3:]):
        scale = (0.5, 0.25)[place % 2]
        (shrunk,) = (gate < 0.9).nonzero().flatten().tolist()  # one direction, as there is one intruder
        assert float(gate[shrunk]) == pytest.approx(scale, abs=1e-4)
        assert shrunk != least
        drawn.add(shrunk)
    assert len(drawn) >= 4
    share = (Q.T @ before).norm() ** 2 / before.norm() ** 2
    assert report.intruder_share == pytest.approx(float(share), rel=1e-4)
    expected = {round(float(sigma**2 / (S**2).sum()), 5) for sigma in S[:6]}
    assert {round(control.share, 5) for control in report.controls} <= expected
    assert "controls: 19 of other components" in "\n".join(report.details)


def test_what_any_shrinking_would_gain_is_not_kept(busy):
    model, _ = busy
    before = state_of(model)

    calls = []

    def text(model):  # any edit gains as much
        calls.append(1)
        return torch.arange(40.0) + 1e-4 * torch.randn(40) + (0.0 if len(calls) == 1 else 1.0)

    own = evaluation.function(lambda model: torch.arange(4.0), name="own")
    report = run(model, own, evaluation.function(text, name="text"))
    assert (report.kept, report.verdict, report.scale) == (False, "INCONCLUSIVE", None)
    assert report.p_value > 0.05
    assert "other components do as well" in report.reasons[0]
    assert same(model, before)
    with pytest.raises(ValueError, match="`controls` must be at least 19"):
        run(model, own, evaluation.function(text, name="text"), controls=10)


def test_the_edit_says_only_what_was_measured(busy, tmp_path):
    model, W = busy
    before = update_of(model)
    U, S, Vh = torch.linalg.svd(before)
    own = evaluation.function(lambda model: torch.arange(4.0), name="own")

    def text(model):
        return torch.arange(40.0) + 1e-4 * torch.randn(40) - float((Q.T @ update_of(model)).norm())

    Q = intruder_vectors(W, W + before.float(), top_k=10, below=0.5).double()
    report = run(model, own, evaluation.function(text, name="text"), scales=(0.5,))
    (row,) = report.edit.modules
    after = update_of(model)
    expected = torch.einsum("ik,ij,kj->k", U[:, :6], after, Vh[:6]) / S[:6]  # each gate of its own component
    assert row.gate == pytest.approx(expected.tolist(), abs=1e-4)
    assert row.singular_values == pytest.approx(S[:6].tolist(), rel=1e-5)
    assert row.edited_singular_values == pytest.approx(torch.linalg.svdvals(after)[:6].tolist(), rel=1e-5)
    assert row.num_intruders == Q.shape[1]
    record = report.edit.record()
    assert not {"sensitivity", "num_examples", "aggregate", "seed"} & (set(record) | set(record["modules"][0]))
    report.save(tmp_path / "out")
    (kept,) = json.loads((tmp_path / "out" / "lorakit_surgery.json").read_text())["edits"]
    assert (kept["policy"], kept["policy_parameters"]) == ("restore", {"scale": 0.5})
    report.edit.plot()
    assert "1 intruder directions in 1 modules, scaled by 0.5" in repr(report.edit)


@pytest.mark.parametrize(("rank", "intruders", "left_out"), [(6, 2, 2), (6, 4, 0), (2, 3, 0)])
def test_how_many_directions_a_control_draws(rank, intruders, left_out, adapted_linear):
    module, U = adapted_linear(rank)
    Q = U[:, :intruders] if intruders <= rank else torch.linalg.qr(torch.randn(D, intruders))[0]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        drawn = other_directions(module, Q, generator)
        assert drawn.shape == (D, min(rank, intruders))
        cosines = (U.T @ drawn).abs()
        assert torch.allclose(cosines.amax(0), torch.ones(drawn.shape[1]), atol=1e-4)
        seen |= set(cosines.argmax(0).tolist())
    assert seen == set(range(left_out, rank))


@pytest.fixture
def adapted_linear():
    def make(rank):
        model = get_peft_model(nn.Sequential(nn.Linear(D, D)), LoraConfig(r=rank, target_modules=["0"]))
        layer = model.base_model.model[0]
        U, V = (torch.linalg.qr(torch.randn(D, rank))[0] for _ in range(2))
        layer.lora_B["default"].weight.data = U * torch.arange(rank, 0, -1.0)
        layer.lora_A["default"].weight.data = V.T.clone()
        (module,) = live_modules(model, "default")
        return module, U

    return make


def test_an_adapter_on_disk_is_written_if_a_scale_is_kept(saved, tmp_path):
    settings = {"objective": "restore", "base": saved["base"], "progress": False, "target_modules": "all-linear"}
    calls = []

    def text(model):  # the frontier gains, the controls do not
        calls.append(1)
        return torch.arange(40.0) + 1e-3 * torch.randn(40) + float(1 < len(calls) <= 5)

    files = {path.name: path.read_bytes() for path in saved["adapter"].iterdir()}
    task = evaluation.loss(saved["own"], name="own")
    report = refine(
        saved["adapter"], None, task=task, margin=50, base_text=evaluation.function(text, name="text"), **settings
    )
    assert report.kept
    report.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in saved["adapter"].iterdir()} == files
    assert (tmp_path / "out" / "adapter_config.json").exists()
    (edit,) = read_edits(tmp_path / "out")
    written = evaluation.load_adapted(saved["base"], tmp_path / "out")
    scores = evaluation.evaluate(written, task, progress=False)["own"].scores
    (point,) = (point for point in report.frontier if point.scale == report.scale)
    assert scores == pytest.approx(point.tasks[0].candidate_scores[0], abs=1e-4)
    again = reweight(tmp_path / "out", saved["calibration"], base=saved["base"], num_examples=2, progress=False)
    again.save(tmp_path / "twice")  # the record of the first edit goes along
    first, second = read_edits(tmp_path / "twice")
    assert (first, second["policy"]) == (edit, "smooth_abs")
