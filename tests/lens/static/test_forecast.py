"""Forecasts of merges against dense updates in float64, and against the merge that is then written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from shell import run

from lorakit.adapters import open_adapter
from lorakit.errors import UnsupportedModelError
from lorakit.lens import compare
from lorakit.merging import merge

SHAPES = {"q_proj": (16, 12), "down_proj": (10, 20)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (d_out, d_in) in SHAPES.items():
            setattr(self, name, torch.nn.Linear(d_in, d_out, bias=False))


def adapter(seed, *, r=3, scale=1.0, targets=tuple(SHAPES), **options):
    torch.manual_seed(seed)
    model = get_peft_model(Net(), LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def dense(source):
    view = open_adapter(source)
    with view.source.reader() as read:
        return {module.name: module.update(read).dense().double().numpy() for module in view.modules}


def leading(W, k, side):
    U, _, Vh = np.linalg.svd(W)
    return U[:, :k] if side == "output" else Vh[:k].T


def expected(own, merged, ranks, merged_ranks):
    """The docstring's formulas, written out."""
    square = sum((own[n] ** 2).sum() for n in own)
    strength = sum((merged[n] * own[n]).sum() for n in own) / square
    shares = []
    for n in own:
        sides = [
            (np.linalg.norm(leading(merged[n], merged_ranks[n], s).T @ leading(own[n], ranks[n], s)) ** 2) / ranks[n]
            for s in ("output", "input")
        ]
        shares.append(sum(sides) / 2)
    return strength, np.mean(shares), square**0.5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("svd", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.4}),
        ("dare", {"density": 0.6, "seed": 3}),
    ],
)
def test_the_forecast_is_that_of_the_merge_that_is_written(tmp_path, method, options):
    a, b = adapter(1), adapter(2, r=4, scale=0.5, targets=["q_proj"])  # down_proj is in A only
    weights = (0.7, -0.4)
    merge([a, b], tmp_path / "merged", weights=weights, method=method, **options)
    merged = dense(tmp_path / "merged")
    ranks = {name: np.linalg.matrix_rank(W, tol=1e-4) for name, W in merged.items()}
    report = compare(a, b, weights=weights, methods=[method], **options)
    (found,) = report.forecast.methods
    sizes = {}
    for label, own, rank in (("a", dense(a), 3), ("b", dense(b), 4)):
        strength, directions, norm = expected(own, merged, dict.fromkeys(own, rank), ranks)
        assert getattr(found, f"strength_{label}") == pytest.approx(strength, rel=1e-4)
        assert getattr(found, f"energy_{label}") == pytest.approx(strength**2, rel=1e-4)
        assert getattr(found, f"directions_{label}") == pytest.approx(directions, rel=1e-4)
        sizes[label] = abs(strength) * norm
    assert found.dominance_a == pytest.approx(sizes["a"] / (sizes["a"] + sizes["b"]), rel=1e-4)
    assert found.norm == pytest.approx(sum((W**2).sum() for W in merged.values()) ** 0.5, rel=1e-4)
    assert found.rank == max(ranks.values())
    assert found.density == options.get("density")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_linear_strength_is_the_closed_form(seed, weights):
    a, b = adapter(seed), adapter(seed + 100)
    (found,) = compare(a, b, weights=weights, methods=["linear"]).forecast.methods
    one, other = dense(a), dense(b)
    inner = sum((one[n] * other[n]).sum() for n in one)
    square = sum((one[n] ** 2).sum() for n in one)
    assert found.strength_a == pytest.approx(weights[0] + weights[1] * inner / square, abs=1e-5)


def test_an_adapter_merged_with_itself_is_whole_and_merged_with_its_opposite_is_gone():
    model = adapter(1)
    whole = compare(model, model).forecast
    assert whole.recommended.method == "linear"
    for one in whole.methods:
        assert (one.strength_a, one.directions_a, one.dominance_a) == pytest.approx((1, 1, 0.5), rel=1e-5)
    gone = compare(model, model, weights=(1, -1))
    assert (gone.verdict, gone.reason) == ("conflicting", "opposed")
    assert gone.forecast.methods[0].strength_a == pytest.approx(0, abs=1e-6)
    assert gone.forecast.methods[0].directions_a == 0


def test_the_overall_verdict_takes_the_weights():
    a, b = adapter(1), adapter(2)
    assert compare(a, b).verdict == "safe"
    report = compare(a, b, weights=(0.95, 0.05))
    assert (report.verdict, report.reason) == ("imbalanced", "uneven")
    assert compare(a, b, weights=(1, 0)).verdict == "imbalanced"


def test_of_methods_as_strong_the_first_is_recommended():
    a, b = adapter(1), adapter(2)
    forecast = compare(a, b, methods=["svd", "linear"], rank=9).forecast
    strengths = [one.weaker for one in forecast.methods]
    assert strengths == pytest.approx([0.5, 0.5], abs=0.2)
    assert forecast.recommended.method == "svd"
    assert compare(a, b, methods=["svd", "linear"], rank=1).forecast.recommended.method == "linear"


def test_adapters_that_cannot_be_merged_have_no_forecast_and_the_report_says_why():
    a, b = adapter(1), adapter(2, use_dora=True)
    report = compare(a, b)
    assert report.forecast is None
    assert "DoRA magnitude" in report.no_forecast
    assert any(line.startswith("No forecast of the merge: ") for line in report.details)
    with pytest.raises(UnsupportedModelError, match="DoRA magnitude"):
        merge([a, b], "nowhere")
    broken = adapter(3)
    torch.nn.init.constant_(broken.base_model.model.q_proj.lora_A["default"].weight, torch.nan)
    assert compare(a, broken).forecast is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "one weight for each of 2 adapters; got 1"),
        ({"weights": [1.0, float("nan")]}, ValueError, "must be finite"),
        ({"methods": ["cat"]}, ValueError, "`methods` must be some of linear, svd, ties, dare; got 'cat'"),
        ({"methods": []}, ValueError, "`methods` must be some of linear, svd, ties, dare; got none"),
        ({"methods": "linear"}, TypeError, "`methods` must be a list of methods; got 'linear'"),
        ({"rank": 0}, ValueError, "`rank`"),
        ({"density": 0}, ValueError, "`density`"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        compare("nowhere", "nowhere", **options)


def test_table_json_and_next_step(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        adapter(seed).save_pretrained(tmp_path / name)
    report = compare(tmp_path / "a", tmp_path / "b", weights=(0.75, 0.25), methods=["linear", "ties"])
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))["summary"]
    assert data["forecast"]["weights"] == [0.75, 0.25]
    assert [one["method"] for one in data["forecast"]["methods"]] == ["linear", "ties"]
    assert data["forecast"]["recommended"] == report.forecast.recommended.method
    assert data["verdict"] == report.verdict
    table = report.tables()[0]
    assert table.title == "Forecast of the merge with weights 0.75, 0.25"
    assert [row[0] for row in table.rows] == ["linear", "ties"]
    assert table.rows[0][2] == f"{report.forecast.methods[0].strength_a:.3f}"
    assert report.next_steps[0].endswith("-merged --weights=0.75,0.25")


@pytest.mark.slow
def test_in_a_shell(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        adapter(seed).save_pretrained(tmp_path / name)
    page = tmp_path / "page.html"
    pair = ("compare", tmp_path / "a", tmp_path / "b")
    done = run(*pair, "--weights", "0.7,0.3", "--methods", "linear,dare", "--density", "0.9", "--html", page, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["summary"]["forecast"]
    assert (found["weights"], [one["density"] for one in found["methods"]]) == ([0.7, 0.3], [None, 0.9])
    assert "Forecast of the merge with weights 0.7, 0.3" in page.read_text()
    assert "Forecast of the merge with weights 0.5, 0.5" in run(*pair).stdout
    assert run(*pair, "--weights", "0.7").returncode == 2
