"""Energy curves, against numpy's float64 SVD of the dense updates."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from lorakit import SpecLoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.lens import energy_curves

THRESHOLDS = ("0.9", "0.95", "0.99")


def reference(sigma):
    """C(k), Σ_{i>k} σ² and σ_{k+1} by their definitions."""
    energy, tail, following = [], [], []
    for k in range(1, len(sigma) + 1):
        energy.append(sum(s**2 for s in sigma[:k]) / sum(s**2 for s in sigma))
        tail.append(sum(s**2 for s in sigma[k:]))
        following.append(sigma[k] if k < len(sigma) else 0.0)
    return energy, tail, following


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_against_numpy(tmp_path, randomize, tiny_llama, updates, dtype):
    config = LoraConfig(
        r=5, lora_alpha=3, target_modules="all-linear", rank_pattern={"down_proj": 8, "v_proj": 2}, use_rslora=True
    )
    model = randomize(get_peft_model(tiny_llama(dtype), config, autocast_adapter_dtype=False))
    model.save_pretrained(tmp_path)
    expected = {name: numpy.linalg.svd(update, compute_uv=False) for name, update in updates(model).items()}
    for source in (model, tmp_path, tmp_path / "adapter_model.safetensors"):
        report = energy_curves(source)
        assert report.findings == ()
        assert {row.module_name for row in report.modules} == set(expected)
        curves = {}
        for row in report.modules:
            rank = {"down_proj": 8, "v_proj": 2}.get(row.module_name.rpartition(".")[2], 5)
            energy, tail, following = reference(expected[row.module_name][:rank])
            curves[row.module_name] = energy
            total = tail[0] + following[0] ** 2 + expected[row.module_name][0] ** 2
            assert row.rank == len(row.energy) == rank
            assert row.energy == pytest.approx(energy, abs=1e-6)
            assert row.truncation_error == pytest.approx(tail, rel=1e-4, abs=1e-7 * total)
            assert row.spectral_error == pytest.approx(following, rel=1e-4)
            assert row.energy_rank == {q: next(k for k, c in enumerate(energy, 1) if c >= float(q)) for q in THRESHOLDS}
        down = [curves[name] for name in curves if name.endswith("down_proj")]
        role = next(role for role in report.roles if role.name == "down")
        assert (role.modules, len(role.mean)) == (2, 8)
        assert role.mean == pytest.approx(numpy.mean(down, 0), abs=1e-6)
        padded = numpy.array([curve + [1.0] * (8 - len(curve)) for curve in curves.values()])
        assert report.total.modules == len(padded) == 14
        assert report.total.mean == pytest.approx(padded.mean(0), abs=1e-6)
        assert report.total.low == pytest.approx(numpy.quantile(padded, 0.1, axis=0), abs=1e-6)
        assert report.total.high == pytest.approx(numpy.quantile(padded, 0.9, axis=0), abs=1e-6)
        for q in THRESHOLDS:
            assert report.total.energy_rank[q] == next(k for k, c in enumerate(padded.mean(0), 1) if c >= float(q))
            assert report.total.energy_rank_of_all[q] == max(row.energy_rank[q] for row in report.modules)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_curves_rise_to_one_and_do_not_depend_on_the_scale(from_spectrum, in_memory, sigma, scale):
    sigma = sorted(sigma, reverse=True)
    B, A = from_spectrum(sigma)
    (row,) = energy_curves(in_memory({"q_proj": (B, A)})).modules
    (scaled,) = energy_curves(in_memory({"q_proj": (B * scale, A)})).modules
    energy, tail, following = reference(sigma)
    assert row.energy == pytest.approx(energy, abs=1e-9)
    assert all(a <= b for a, b in zip(row.energy, row.energy[1:], strict=False))
    assert row.energy[-1] == 1
    assert row.truncation_error == pytest.approx(tail, rel=1e-6, abs=1e-9)
    assert row.spectral_error == pytest.approx(following, abs=1e-9)
    assert scaled.energy == pytest.approx(row.energy, abs=1e-9)
    assert scaled.truncation_error == pytest.approx([scale**2 * value for value in tail], rel=1e-6, abs=1e-9 * scale**2)


def test_a_threshold_that_is_met_exactly(from_spectrum, in_memory):
    B, A = from_spectrum([3.0, 1.0])  # C(1) = 0.9
    report = energy_curves(in_memory({"q_proj": (B, A), "k_proj": from_spectrum([1.0])}))
    assert report.modules[0].module_name == "k_proj"
    assert report.modules[1].energy_rank == {"0.9": 1, "0.95": 2, "0.99": 2}
    assert report.total.mean == pytest.approx([0.95, 1.0])
    assert report.total.energy_rank == {"0.9": 1, "0.95": 1, "0.99": 2}


def test_rounding_does_not_raise_the_rank(from_spectrum, in_memory):
    curve = [math.sqrt(0.9), math.sqrt(0.1)]
    for n in range(1, 20):
        modules = {f"layers.{i}.q_proj": from_spectrum(curve, seed=i) for i in range(n)}
        assert energy_curves(in_memory(modules)).total.energy_rank["0.9"] == 1


def test_a_rank_above_the_dimensions_has_min_of_dimensions_components(from_spectrum, in_memory):
    B, A = from_spectrum([2.0, 1.0, 1.0], d_out=3, d_in=9)
    wide = torch.cat([B, B], 1) / 2, torch.cat([A, A])
    (row,) = energy_curves(in_memory({"x": wide})).modules
    assert (row.rank, len(row.energy)) == (6, 3)
    assert row.energy == pytest.approx([4 / 6, 5 / 6, 1.0])


def test_zero_and_non_finite_updates(from_spectrum, in_memory):
    modules = {f"layers.{i}.q_proj": from_spectrum([2.0, 1.0], seed=i) for i in range(4)}
    modules["layers.1.q_proj"][0].zero_()
    modules["layers.2.q_proj"][1][0, 0] = math.nan
    report = energy_curves(in_memory(modules))
    assert [(f.severity, f.code, f.module_name) for f in report.findings] == [
        ("error", "non_finite", "layers.2.q_proj"),
        ("warning", "untrained", "layers.1.q_proj"),
    ]
    assert report.has_errors
    assert [row.module_name for row in report.modules] == ["layers.0.q_proj", "layers.1.q_proj", "layers.3.q_proj"]
    zero = report.modules[1]
    assert (zero.energy, zero.truncation_error, zero.energy_rank) == (
        (0.0, 0.0),
        (0.0, 0.0),
        dict.fromkeys(THRESHOLDS, 0),
    )
    assert (report.total.modules, report.total.mean) == (2, pytest.approx([0.8, 1.0]))
    json.dumps(report.to_dict(), allow_nan=False)
    alone = energy_curves(in_memory({"layers.1.q_proj": modules["layers.1.q_proj"]}))
    assert (alone.total, alone.roles) == (None, ())
    json.dumps(alone.to_dict(), allow_nan=False)


def test_speclora_has_a_finding_for_its_low_rank_part(tmp_path, randomize, tiny_llama, updates):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=4, k=8, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        report = energy_curves(source)
        assert [finding.code for finding in report.findings] == ["low_rank_part_only"]
        for row in report.modules:
            sigma = numpy.linalg.svd(updates(model)[row.module_name], compute_uv=False)[:4]
            assert row.low_rank_part_only
            assert row.energy == pytest.approx(reference(sigma)[0], abs=1e-6)


def test_the_report(from_spectrum, in_memory):
    report = energy_curves(in_memory({"layers.0.q_proj": from_spectrum([2.0, 1.0])}))
    content = report.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False))["modules"][0]["energy"] == pytest.approx([0.8, 1.0])
    assert set(content) == {"modules", "summary", "findings"}
    assert content["summary"]["roles"][0]["name"] == "query"
    with pytest.raises(AttributeError):
        report.total = None
    assert report.headline.endswith("mean energy of 1 updates reached at rank 2 (90%), 2 (95%), 2 (99%)")
    assert report.details == ("every module keeps 90% at rank 2", "query (1): 90% at rank 2")
    assert report.next_steps == ()  # in memory
    assert report.to_frame()["energy_rank_0.9"].tolist() == [2]


def test_next_steps_are_commands_for_the_adapter_on_disk(write_adapter, from_spectrum):
    low = write_adapter("a b", {"layers.0.q_proj": from_spectrum([9.0, 1.0, 0.1])})
    (step,) = energy_curves(low).next_steps
    assert step == f"lorakit compress '{low}' '{low}-energy-90' --energy 0.9"
    full = write_adapter("full", {"layers.0.q_proj": from_spectrum([1.0, 1.0])})
    assert energy_curves(full).next_steps == (f"lorakit audit {full} --suggest-ranks",)


def test_invalid_arguments(tmp_path):
    with pytest.raises(AdapterFileError):
        energy_curves(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="adapter_name"):
        energy_curves(tmp_path, adapter_name="default")


def test_the_figure(from_spectrum, in_memory):
    modules = {f"layers.{i}.{leaf}": from_spectrum([2.0, 1.0, i + 1]) for i in range(3) for leaf in ("q_proj", "$x$")}
    report = energy_curves(in_memory(modules))
    (axes,) = report.plot().axes
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in labelled] == [r"\$x\$", "query", "all"]
    assert labelled[1].get_ydata() == pytest.approx(report.roles[1].mean)
    assert len(axes.collections) == 1  # one band
    empty = energy_curves(in_memory({"q_proj": tuple(0 * half for half in from_spectrum([1.0]))}))
    assert empty.plot().axes[0].get_legend() is None


@pytest.mark.slow
def test_diagnostics_of_files_import_neither_peft_nor_matplotlib(write_adapter, from_spectrum, run_python):
    directories = [str(write_adapter(f"r{r}", {"layers.0.q_proj": from_spectrum([2.0] * r)})) for r in (2, 3)]
    code = f"""
        import sys
        from lorakit import lens
        lens.energy_curves({directories[0]!r}).to_dict()
        print(lens.scaling_law({directories!r}).total.law.beta)
        print(sorted({{"transformers", "peft", "accelerate", "matplotlib"}} & set(sys.modules)))
    """
    beta, heavy = run_python(code).stdout.split("\n")[:2]
    assert (float(beta), heavy) == (pytest.approx(1.0), "[]")
