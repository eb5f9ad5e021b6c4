"""Bounds on the loss of a cut: their formulas, that they hold for a loss of known curvature, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lorakit import SpecLoRAConfig
from lorakit.experiments import pilot
from lorakit.lens import Curvature, LossGap, audit, energy_curves, write_html

Q, V = "layers.0.q_proj", "layers.0.v_proj"
SIGMA = {Q: [4.0, 2.0, 1.0], V: [3.0, 3.0]}


@pytest.fixture
def adapter(in_memory, from_spectrum):
    return in_memory({name: from_spectrum(sigma, seed=i) for i, (name, sigma) in enumerate(SIGMA.items())})


def tail(name, rank):
    return sum(s**2 for s in SIGMA[name][rank:])


def test_suggestions_have_the_bounds_of_all_modules_together(adapter):
    report = audit(adapter, curvature=Curvature(0.5, 0.1))
    assert report.curvature == (Curvature(0.5, 0.1),)
    assert len(report.suggestions) == 6
    for suggestion in report.suggestions:
        cut = sum(tail(name, suggestion.ranks[name]) for name in SIGMA)
        (gap,) = suggestion.loss_gaps
        assert (gap.of, gap.lower, gap.upper) == (None, pytest.approx(0.05 * cut), pytest.approx(0.25 * cut))
    assert any(suggestion.loss_gaps[0].upper > 0 for suggestion in report.suggestions)


def test_suggestions_have_the_bounds_of_each_module_that_has_a_curvature(adapter):
    curvature = [Curvature(2.0, of=f"base_model.model.{V}"), Curvature(0.5, 0.0, of=Q)]
    report = audit(adapter, energy=0.8, curvature=curvature)
    for suggestion in report.suggestions:
        of_v, of_q = suggestion.loss_gaps
        assert of_v == LossGap(V, None, pytest.approx(tail(V, suggestion.ranks[V])))
        assert of_q == LossGap(Q, 0.0, pytest.approx(0.25 * tail(Q, suggestion.ranks[Q])))
    assert audit(adapter, energy=0.8, curvature=curvature[1]).suggestions[0].loss_gaps == (
        report.suggestions[0].loss_gaps[1],
    )


def test_the_report_calls_them_local_estimates(adapter, tmp_path):
    report = audit(adapter, energy=0.7, curvature=[Curvature(2.0, 0.5, of=Q), Curvature(1.0, of=V)])
    table = next(table for table in report.tables() if table.title == "More loss at the suggested ranks")
    assert table.headings == ("policy", "cut", "rank", "at least", "at most")
    assert table.rows[0] == ("global median", Q, "1", "1.25", "5")
    assert table.rows[1][1:] == (V, "1", "", "4.5")
    assert len(table.rows) == 2 * len(report.suggestions)
    assert "Local estimates" in table.note
    assert any(line.endswith("more loss, a local estimate") and Q in line for line in report.details)
    write_html(report, tmp_path / "page.html")
    assert "More loss at the suggested ranks" in (tmp_path / "page.html").read_text()
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))["summary"]
    assert data["curvature"] == [
        {"smoothness": 2.0, "strong_convexity": 0.5, "of": Q},
        {"smoothness": 1.0, "strong_convexity": None, "of": V},
    ]
    assert data["suggestions"][0]["loss_gaps"][0] == {"of": Q, "lower": pytest.approx(1.25), "upper": pytest.approx(5)}
    without = audit(adapter, suggest_ranks=True)
    assert not any(table.title == "More loss at the suggested ranks" for table in without.tables())
    assert without.to_dict()["summary"]["curvature"] == []
    upper_only = audit(adapter, curvature=Curvature(1.0))
    headings = [table.headings for table in upper_only.tables() if table.title == "More loss at the suggested ranks"]
    assert headings == [("policy", "cut", "rank", "at most")]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(1e-3, 10), min_size=1, max_size=6), st.floats(0, 100), st.floats(0, 1) | st.none(), st.booleans()
)
def test_curves_have_the_bounds_of_every_rank(from_spectrum, in_memory, sigma, smoothness, part, everywhere):
    sigma = np.sort(sigma)[::-1]
    mu = None if part is None else part * smoothness
    adapter = in_memory({Q: from_spectrum(sigma.copy()), V: from_spectrum([1.0])})
    report = energy_curves(adapter, curvature=Curvature(smoothness, mu, None if everywhere else Q))
    row, other = report.modules
    tails = np.array([np.sum(sigma[k:] ** 2) for k in range(1, len(sigma) + 1)])
    assert row.loss_gap_upper == pytest.approx(smoothness / 2 * tails, rel=1e-6, abs=1e-9)
    if mu is None:
        assert row.loss_gap_lower is None
    else:
        assert row.loss_gap_lower == pytest.approx(mu / 2 * tails, rel=1e-6, abs=1e-9)
    assert other.loss_gap_upper == ((0.0,) if everywhere else None)
    json.dumps(report.to_dict(), allow_nan=False)


def test_curves_say_the_bound_where_they_keep_90_percent(adapter):
    single = energy_curves(adapter, curvature=Curvature(2.0, of=Q))
    assert f"{Q} cut to 90%: at most 1 more loss, a local estimate" in single.details
    together = energy_curves(adapter, curvature=Curvature(2.0))
    assert "all modules together cut to 90%: at most 1 more loss, a local estimate" in together.details
    assert together.rows()[0]["loss_gap_upper"] == pytest.approx([5, 1, 0])
    assert energy_curves(adapter).rows()[0]["loss_gap_upper"] is None


class Regression(nn.Module):
    """½ mean squared error of one linear layer: a quadratic with Hessian XᵀX / n in each row of its weight."""

    def __init__(self, W):
        super().__init__()
        self.linear = nn.Linear(5, 4, bias=False).double()
        self.linear.weight.data = W.clone()

    def forward(self, x, y):
        return type("Output", (), {"loss": (self.linear(x) - y).square().sum(-1).mean() / 2})()


def test_the_measured_bounds_hold_for_a_loss_of_constant_curvature():
    """The adapter is at the minimum; every cut of it costs between the bounds that its Hessian gives."""
    torch.manual_seed(4)
    x, W0, best = torch.randn(40, 5).double(), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    batch = {"x": x, "y": x @ best.mT}
    model = get_peft_model(Regression(W0), LoraConfig(r=4, lora_alpha=4, target_modules=["linear"])).double()
    U, S, Vh = torch.linalg.svd(best - W0, full_matrices=False)
    layer = model.get_base_model().linear
    layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data = U * S, Vh
    measured = pilot.hessian_spectrum(Regression(best), [batch], num_batches=1, k=1, module="linear", tol=1e-10)
    eigenvalues = np.linalg.eigvalsh((x.mT @ x / 40).numpy())
    assert measured.smoothness == pytest.approx(eigenvalues[-1])
    assert measured.strong_convexity == pytest.approx(eigenvalues[0])

    row = energy_curves(model, curvature=measured).modules[0]
    for rank in range(1, 4):
        cut = W0 + (U[:, :rank] * S[:rank]) @ Vh[:rank]
        loss = Regression(cut)(**batch).loss.item()
        assert row.loss_gap_lower[rank - 1] < loss < row.loss_gap_upper[rank - 1]
    for suggestion in audit(model, energy=0.5, curvature=measured).suggestions:
        rank = suggestion.ranks["linear"]
        (gap,) = suggestion.loss_gaps
        assert gap.upper == pytest.approx(row.loss_gap_upper[rank - 1], rel=1e-5)
        assert gap.lower == pytest.approx(row.loss_gap_lower[rank - 1], rel=1e-5)


def test_updates_known_in_part_have_no_bound(tiny_llama, randomize):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=4, k=8, target_modules=["q_proj"])))
    for report in (audit(model, curvature=Curvature(1.0)), energy_curves(model, curvature=Curvature(1.0))):
        (finding,) = [finding for finding in report.findings if finding.code == "no_loss_gap"]
        assert "2 modules have no bound on the loss" in finding.message
        if hasattr(report, "suggestions"):
            assert [suggestion.loss_gaps for suggestion in report.suggestions] == [()] * 6
        else:
            assert all(row.loss_gap_upper is None for row in report.modules)
            assert not any("more loss" in line for line in report.details)


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), r"`smoothness` must be a number from 0 to 1e\+100; got -1.0"),
        ((1.0, -0.5), r"`strong_convexity` must be a number from 0 to 1e\+100; got -0.5"),
        ((1.0, 2.0), r"`strong_convexity` \(μ\) must be at most `smoothness` \(L\); got 2 and 1"),
        ((math.inf,), "`smoothness` must be a number .* got inf"),
        ((math.nan,), "`smoothness` must be a number .* got nan"),
        ((1.0, math.nan), "`strong_convexity` must be a number"),
        (("1",), "`smoothness` must be a number .* got '1'"),
        ((True,), "`smoothness` must be a number .* got True"),
    ],
)
def test_numbers_that_are_no_curvature(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curvature(*arguments)


PAIR = pilot.HessianPair(1.0, 0.0, None)
FACTORS = pilot.HessianSpectrum("adapter", 9, 1, 1, 1.0, (PAIR,), PAIR)


@pytest.mark.parametrize("function", [audit, energy_curves])
@pytest.mark.parametrize(
    ("curvature", "error", "message"),
    [
        (Curvature(1.0, of="layers.9.q_proj"), ValueError, "`curvature` must be of the adapter's modules, .*9.q_proj"),
        ([Curvature(1.0, of=Q), Curvature(2.0, of=Q)], ValueError, "each module once"),
        ([Curvature(1.0, of=Q), Curvature(2.0)], ValueError, "got both"),
        ([], ValueError, "got an empty list"),
        (FACTORS, ValueError, "about an adapter's factors. Measure it with `module=`"),
        (0.5, TypeError, "a lorakit.lens.Curvature, or a list of them; got float"),
        ("sharp", TypeError, "got str"),
        ([Curvature(1.0, of=Q), None], TypeError, "got NoneType"),
    ],
)
def test_curvatures_that_do_not_fit(adapter, function, curvature, error, message):
    with pytest.raises(error, match=message):
        function(adapter, curvature=curvature)


@pytest.mark.slow
def test_the_command(write_adapter, from_spectrum):
    from typer.testing import CliRunner

    from lorakit.cli.app import app

    path = str(write_adapter("a", {Q: from_spectrum(SIGMA[Q])}, lora_alpha=3, rank_pattern={}, r=3))
    done = CliRunner().invoke(app, ["audit", path, "--smoothness", "0.5", "--strong-convexity", "0.1"])
    assert done.exit_code == 0, done.output
    assert "More loss at the suggested ranks" in done.output
    assert "all modules together" in done.output
    alone = CliRunner().invoke(app, ["audit", path, "--strong-convexity", "0.1"])
    assert alone.exit_code == 2
    assert "--smoothness" in alone.output
