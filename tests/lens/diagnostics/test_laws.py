"""The scaling law of effective ranks, against numpy's polyfit of numpy's float64 spectra."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from lorakit import SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.errors import AdapterFileError
from lorakit.lens import scaling_law


def effective_rank(update):
    sigma = numpy.linalg.svd(update, compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 1e-12]
    return math.exp(-(p * numpy.log(p)).sum())


def fitted(ranks, values):
    """a, β, R² and β's standard error, by numpy."""
    x, y = numpy.log(ranks), numpy.log(values)
    (beta, intercept), residual, *_ = numpy.polyfit(x, y, 1, full=True)
    r_squared = 1 - residual[0] / ((y - y.mean()) ** 2).sum()
    covariance = numpy.polyfit(x, y, 1, cov=True)[1]
    return math.exp(intercept), beta, r_squared, math.sqrt(covariance[0, 0])


def check(fit, points):
    """Compare a fit with `points`: rank → effective ranks of its modules."""
    ranks = sorted(points)
    assert [point.rank for point in fit.points] == ranks
    for point in fit.points:
        values = points[point.rank]
        assert point.modules == len(values)
        assert point.effective_rank == pytest.approx(numpy.mean(values), rel=1e-5)
        assert point.std == pytest.approx(numpy.std(values, ddof=1), abs=1e-4)
        assert point.stderr == pytest.approx(numpy.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-4)
    a, beta, r_squared, stderr = fitted(ranks, [numpy.mean(points[rank]) for rank in ranks])
    assert (fit.law.a, fit.law.beta) == pytest.approx((a, beta), rel=1e-4)
    assert fit.law.r_squared == pytest.approx(r_squared, abs=1e-5)
    assert fit.beta_stderr == pytest.approx(stderr, abs=1e-4)
    assert fit.reason is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_against_numpy(tmp_path, randomize, tiny_llama, updates, dtype):
    models, paths = [], []
    for r in (2, 4, 8, 16):
        config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], use_rslora=r == 8)
        models.append(randomize(get_peft_model(tiny_llama(dtype), config, autocast_adapter_dtype=False), seed=r))
        paths.append(tmp_path / str(r))
        models[-1].save_pretrained(paths[-1])
    expected = [{name: effective_rank(update) for name, update in updates(model).items()} for model in models]
    for sources in (models, paths):
        report = scaling_law(sources)
        assert report.findings == ()
        check(report.total, {r: list(found.values()) for r, found in zip((2, 4, 8, 16), expected, strict=True)})
        assert [fit.name for fit in report.roles] == ["query", "value"]
        for fit, leaf in zip(report.roles, ("q_proj", "v_proj"), strict=True):
            own = [[value for name, value in found.items() if name.endswith(leaf)] for found in expected]
            check(fit, dict(zip((2, 4, 8, 16), own, strict=True)))


def law_adapters(from_spectrum, in_memory, a=1.0, beta=0.5, ranks=(4, 9, 16), names=("layers.0.q_proj",)):
    """Adapters whose effective ranks follow a law."""
    found = []
    for r in ranks:
        target = a * r**beta
        found.append(in_memory({name: from_spectrum(spectrum(target, r)) for name in names}, path=f"r{r}"))
    return found


def spectrum(target, r):
    """A geometric sequence of r singular values with a given effective rank, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(200):
        q = (low + high) / 2
        p = numpy.array([q**i for i in range(r)])
        p = p / p.sum()
        value = math.exp(-(p * numpy.log(numpy.where(p > 0, p, 1))).sum())
        low, high = (q, high) if value < target else (low, q)
    return [q**i for i in range(r)]


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 0.9), st.floats(1.0, 1.1))
def test_a_law_is_recovered(from_spectrum, in_memory, beta, a):
    report = scaling_law(law_adapters(from_spectrum, in_memory, a, beta))
    assert (report.total.law.a, report.total.law.beta) == pytest.approx((a, beta), abs=1e-3)
    assert report.total.law.r_squared == pytest.approx(1, abs=1e-4)
    assert report.total.beta_stderr == pytest.approx(0, abs=1e-3)


def test_modules_of_one_adapter_count_at_their_own_ranks(from_spectrum, in_memory):
    factors = {f"layers.{i}.q_proj": from_spectrum([1.0] * r, seed=r) for i, r in enumerate((2, 2, 8, 16))}
    report = scaling_law(in_memory(factors))
    assert [(point.rank, point.modules) for point in report.total.points] == [(2, 2), (8, 1), (16, 1)]
    assert (report.total.law.a, report.total.law.beta) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert (report.total.points[0].std, report.total.points[1].std, report.total.points[1].stderr) == (
        pytest.approx(0, abs=1e-6),
        None,
        None,
    )
    assert [finding.code for finding in report.findings] == ["mixed_modules", "mixed_modules"]


def test_a_role_with_one_rank_has_no_fit_but_a_reason(from_spectrum, in_memory):
    one = in_memory({"q_proj": from_spectrum([1.0] * 2), "v_proj": from_spectrum([1.0] * 4)})
    other = in_memory({"q_proj": from_spectrum([1.0] * 8), "v_proj": from_spectrum([1.0] * 4)})
    report = scaling_law([one, other])
    fits = {fit.name: fit for fit in report.roles}
    assert fits["value"].law is None
    assert fits["value"].reason == "all modules have rank 4, and a law needs two ranks or more"
    assert fits["value"].points[0].modules == 2
    assert fits["query"].law.beta == pytest.approx(1.0)
    assert fits["query"].beta_stderr is None
    codes = [(finding.severity, finding.code, finding.message.partition(":")[0]) for finding in report.findings]
    assert codes == [
        ("warning", "mixed_modules", "all"),
        ("info", "two_points", "query"),
        ("info", "no_fit", "value"),
    ]
    json.dumps(report.to_dict(), allow_nan=False)


def test_zero_and_non_finite_updates_are_left_out(from_spectrum, in_memory):
    names = [f"layers.{i}.q_proj" for i in range(3)]
    adapters = []
    for r in (2, 4, 8):
        factors = {name: from_spectrum([1.0] * r, seed=r) for name in names}
        factors[names[1]][0].zero_()
        factors[names[2]][1][0, 0] = math.inf
        adapters.append(in_memory(factors, path=f"r{r}"))
    report = scaling_law(adapters)
    assert [point.modules for point in report.total.points] == [1, 1, 1]
    assert report.total.law.beta == pytest.approx(1.0)
    assert [(f.code, f.module_name) for f in report.findings if f.severity == "error"] == [("non_finite", names[2])] * 3
    assert [f.message.partition(":")[0] for f in report.findings if f.code == "left_out"] == ["r2", "r4", "r8"]
    nothing = scaling_law([replace(adapter, modules=adapter.modules[1:]) for adapter in adapters])
    assert (nothing.total.law, nothing.total.points, nothing.roles) == (None, (), ())
    assert "non-zero" in nothing.total.reason
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_several_speclora_adapters_in_one_model(randomize, tiny_llama, updates):
    model = get_peft_model(tiny_llama(), SpecLoRAConfig(r=2, k=8, target_modules=["q_proj"]), adapter_name="r2")
    model.add_adapter("r6", SpecLoRAConfig(r=6, k=8, target_modules=["q_proj"]))
    model.add_adapter("r4", SpecLoRAConfig(r=4, k=8, target_modules=["q_proj"]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    randomize(model)
    report = scaling_law([open_adapter(model, adapter_name=name) for name in ("r2", "r6", "r4")])
    check(report.total, {r: [effective_rank(u) for u in updates(model, f"r{r}").values()] for r in (2, 4, 6)})
    assert [finding.code for finding in report.findings] == ["low_rank_part_only"] * 3


def test_different_bases_are_a_finding(from_spectrum, in_memory):
    adapters = [
        in_memory({"q_proj": from_spectrum([1.0] * r)}, base_model_name_or_path=base)
        for r, base in ((2, "one"), (4, "other"), (8, None))
    ]
    report = scaling_law(adapters)
    assert [(finding.code, finding.severity) for finding in report.findings] == [("different_base", "warning")]
    assert "one, other" in report.findings[0].message


def test_invalid_arguments(tmp_path):
    with pytest.raises(TypeError, match="`adapters` must be an adapter or several: .* got NoneType"):
        scaling_law(None)
    with pytest.raises(ValueError, match="`adapters` must have at least one"):
        scaling_law([])
    with pytest.raises(AdapterFileError):
        scaling_law(str(tmp_path / "nowhere"))


def test_the_figure(from_spectrum, in_memory):
    adapters = law_adapters(from_spectrum, in_memory, names=("layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"))
    report = scaling_law(adapters)
    assert report.headline.startswith("effective rank = a · r^β over 3 adapters: a = 1, β = 0.500 ± ")
    assert report.details[0].startswith("query: a = 1, β = 0.500 ± ")
    assert [row["name"] for row in report.rows()] == ["all", "query", "value"]
    (axes,) = report.plot().axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.partition(":")[0] for label in labels] == ["r̂ = r", "query", "value", "all"]
    assert all("r^0.500" in label and "R² = 1.0000" in label for label in labels[1:])
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert len(lines) == len(axes.containers) == 3
    assert lines[-1].get_ydata() == pytest.approx([2.0, 4.0], rel=1e-4)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "9", "16"]
    without = scaling_law(adapters[0]).plot().axes[0]
    assert not any("r^" in text.get_text() for text in without.get_legend().get_texts())
