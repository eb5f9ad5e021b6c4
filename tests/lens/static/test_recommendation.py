"""What an audit has beside its spectra: norms relative to the base, averages, concentration, a recommendation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from lorakit.adapters import base_norms as cache
from lorakit.lens import audit
from lorakit.lens.static.recommendation import agreement_of

SIZES = {"a": (12, 10), "b": (20, 10), "c": (12, 16)}
SPECTRA = {"a": [9.0, 8, 0.1, 0.1], "b": [4.0, 4, 4, 4], "c": [20.0, 0.1, 0.1, 0.1]}


@pytest.fixture
def adapted():
    """A model whose adapter has the spectra above, scaling included."""
    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(d_in, d_out) for name, (d_out, d_in) in SIZES.items()})
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(SIZES)))
    for name, layer in model.base_model.model.items():
        U, V = (torch.linalg.qr(torch.randn(size, 4))[0] for size in SIZES[name])
        layer.lora_A["default"].weight.data = V.T.contiguous()
        layer.lora_B["default"].weight.data = U * torch.tensor(SPECTRA[name]) / 2
    return model


def test_medians_weighted_means_and_concentration(adapted):
    report = audit(adapted)
    energies = np.array([np.square(SPECTRA[name]).sum() for name in SIZES])
    stable = energies / np.array([np.max(SPECTRA[name]) ** 2 for name in SIZES])
    parameters = np.array([4 * sum(SIZES[name]) for name in SIZES])
    assert report.total.medians["stable_rank"] == pytest.approx(np.median(stable), rel=1e-5)
    assert report.total.weighted_means["stable_rank"] == pytest.approx(np.average(stable, weights=parameters), rel=1e-5)
    shares = energies / energies.sum()
    assert report.total.top_share == pytest.approx(shares.max(), rel=1e-5)
    assert report.total.concentration == pytest.approx(np.square(shares).sum(), rel=1e-5)
    assert [row.top1_share for row in report.modules] == pytest.approx(list(1 / stable), rel=1e-5)
    assert report.total.relative_norm is None


def test_norms_relative_to_the_base_are_those_of_its_weights_and_are_cached(adapted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = {f"{name}.weight": layer.base_layer.weight.data for name, layer in adapted.base_model.model.items()}
    save_file(weights, tmp_path / "model.safetensors")
    expected = {name: np.linalg.norm(SPECTRA[name]) / np.linalg.norm(weights[f"{name}.weight"]) for name in SIZES}
    for base in (adapted, tmp_path):
        report = audit(adapted, base=base)
        found = {row.module_name: row.relative_norm for row in report.modules}
        assert found == pytest.approx(expected, rel=1e-5)
    total = np.linalg.norm(np.concatenate(list(SPECTRA.values())))
    total /= np.linalg.norm(np.concatenate([w.numpy().ravel() for w in weights.values()]))
    assert report.total.relative_norm == pytest.approx(total, rel=1e-5)
    assert any("of the base weights'" in line for line in report.details)

    def unread(weight):
        raise AssertionError("the norms should be in the cache")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_norm", unread)
        assert [row.relative_norm for row in audit(adapted, base=tmp_path).modules] == list(found.values())
    (file,) = (tmp_path / "cache" / "lorakit" / "base_norms").iterdir()
    file.write_text("{")  # damaged: read again
    assert [row.relative_norm for row in audit(adapted, base=tmp_path).modules] == list(found.values())
    save_file({key: 2 * value for key, value in weights.items()}, tmp_path / "model.safetensors")
    halved = [row.relative_norm for row in audit(adapted, base=tmp_path).modules]
    assert halved == pytest.approx([value / 2 for value in found.values()], rel=1e-5)


def test_one_suggestion_is_starred_with_a_reason(adapted):
    report = audit(adapted, suggest_ranks=True, energy=0.5)
    by_policy = {suggestion.policy: suggestion for suggestion in report.suggestions}
    assert by_policy["per_module"].ranks == {"a": 1, "b": 2, "c": 1}
    assert by_policy["hard_threshold"].ranks == {"a": 1, "b": 1, "c": 1}  # medians 4.05, 4 and 0.1; b has no more
    assert report.recommendation.policy == "global_p90"
    assert "the lowest common rank that keeps 50% of the energy" in report.recommendation.reason
    assert "3 of 4 policies by module suggest no more" in report.recommendation.reason
    rows = next(table for table in report.tables() if table.title.startswith("Suggested")).rows
    assert [row[0] for row in rows if "★" in row[0]] == ["★ global p90"]
    agreement = report.recommendation.agreement["per_module / hard_threshold"]
    assert agreement == pytest.approx((1 + 0.5 + 1) / 3)
    assert agreement_of(by_policy["knee"], by_policy["knee"]) == 1
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["summary"]["recommendation"]["policy"] == "global_p90"


def test_a_budget_is_what_is_recommended_and_no_rank_below_the_own_is_none(adapted):
    report = audit(adapted, budget=200)
    assert report.recommendation.policy == "budget"
    assert "it fits the budget" in report.recommendation.reason
    assert audit(adapted, suggest_ranks=True, energy=1.0).recommendation is None
    assert audit(adapted).recommendation is None
