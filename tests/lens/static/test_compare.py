"""Comparing two adapters: against numpy's float64 SVD of the dense updates, and what chance gives."""

from __future__ import annotations

import copy
import io
import json
import math
import shlex
import subprocess
import sys

import numpy
import pytest
import torch
from closeness import assert_close_reports
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.parse import assemble
from lorakit.adapters.read import TensorDict
from lorakit.errors import AdapterFileError
from lorakit.lens import compare, write_plots
from lorakit.lens.render.table import print_report
from lorakit.lens.static.verdicts import VERDICTS, Thresholds, judge

Q = "model.layers.{}.self_attn.q_proj"


def view(factors, **config):
    """An adapter in memory, of (B, A) by module name."""
    tensors = {}
    for name, (B, A) in factors.items():
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    r = next(iter(factors.values()))[1].shape[0]
    ranks = {name: A.shape[0] for name, (_, A) in factors.items() if A.shape[0] != r}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "rank_pattern": ranks} | config
    return assemble("memory", AdapterSettings.from_config(config), TensorDict(tensors))


def factors(r, d_out=12, d_in=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return B.to(dtype), torch.randn(r, d_in, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(d, n, seed):
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def reference(first, second, k_a, k_b):
    """The quantities of one module, written out in numpy float64, from the dense updates."""
    first, second = first.double().numpy(), second.double().numpy()
    U_a, s_a, Vh_a = numpy.linalg.svd(first, full_matrices=False)
    U_b, s_b, Vh_b = numpy.linalg.svd(second, full_matrices=False)
    out = numpy.linalg.svd(U_a[:, :k_a].T @ U_b[:, :k_b], compute_uv=False)
    into = numpy.linalg.svd(Vh_a[:k_a] @ Vh_b[:k_b].T, compute_uv=False)
    norm_a, norm_b = numpy.linalg.norm(first), numpy.linalg.norm(second)
    return {
        "cosine": (first * second).sum() / norm_a / norm_b,
        "random_cosine": first.size**-0.5,
        "output_overlap": (out**2).mean(),
        "input_overlap": (into**2).mean(),
        "random_output_overlap": max(k_a, k_b) / first.shape[0],
        "random_input_overlap": max(k_a, k_b) / first.shape[1],
        "frobenius_norm_a": norm_a,
        "frobenius_norm_b": norm_b,
        "share_a": norm_a / (norm_a + norm_b),
        "spectral_norm_a": s_a[0],
        "spectral_norm_b": s_b[0],
        "sigma_ratio": max(s_a[0], s_b[0]) / min(s_a[0], s_b[0]),
        "output_angles": tuple(numpy.arccos(out.clip(0, 1))),
        "input_angles": tuple(numpy.arccos(into.clip(0, 1))),
    }


def check(row, first, second, k_a, k_b, rel=1e-4):
    for key, expected in reference(first, second, k_a, k_b).items():
        assert getattr(row, key) == pytest.approx(expected, rel=rel, abs=rel), key


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 14)
        self.conv = nn.Conv2d(5, 13, (3, 2))
        self.grouped = nn.Conv1d(8, 12, 3, groups=2)
        self.gpt = Conv1D(11, 14)
        self.q_proj = nn.Linear(12, 10)
        self.v_proj = nn.Linear(12, 16)


def dense(model, adapter_name):
    """PEFT's own updates of the same factors in float64, with B's rows first, kernels flattened."""
    found = {}
    model = copy.deepcopy(model).double()
    for name, layer in model.base_model.model.named_modules():
        if name == "gpt":
            found[name] = layer.get_delta_weight(adapter_name).detach().mT
        elif name in ("conv", "q_proj", "v_proj"):
            found[name] = layer.get_delta_weight(adapter_name).detach().flatten(1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_numpy_s_for_paths_files_models_and_adapters_of_one_model(tmp_path, randomize, dtype):
    targets = ["embedding", "conv", "gpt", "q_proj", "v_proj"]
    first = LoraConfig(r=3, lora_alpha=5, target_modules=targets, rank_pattern={"q_proj": 5}, use_rslora=True)
    second = LoraConfig(r=6, lora_alpha=2, target_modules=targets[1:], alpha_pattern={"conv": 9})
    model = get_peft_model(Layers().to(dtype), first, "one", autocast_adapter_dtype=False)
    model.add_adapter("two", second, autocast_adapter_dtype=False)
    for i, name in enumerate(("one", "two")):
        model.set_adapter(name)
        randomize(model, seed=i)
    model.save_pretrained(tmp_path)
    updates = dense(model, "one"), dense(model, "two")
    sources = [
        (tmp_path / "one", str(tmp_path / "two")),
        (open_adapter(tmp_path / "one"), model),  # "two" is active
        (model, model),
    ]
    for a, b in sources:
        report = compare(a, b, adapter_name_a="one" if a is model else None)
        assert [row.module_name for row in report.modules] == ["conv", "gpt", "q_proj", "v_proj"]
        assert (report.only_a, report.only_b) == (("embedding",), ())
        for row in report.modules:
            one, two = (update[row.module_name] for update in updates)
            assert (row.directions_a, row.directions_b) == (row.rank_a, row.rank_b)
            check(row, one, two, row.rank_a, row.rank_b)
    file = compare(tmp_path / "one" / "adapter_model.safetensors", tmp_path / "two")
    assert file.total.output_overlap_mean == pytest.approx(report.total.output_overlap_mean, rel=1e-6)


def test_embeddings_and_grouped_convolutions(tmp_path, randomize):
    for name, seed in (("a", 0), ("b", 1)):
        config = LoraConfig(r=4, target_modules=["embedding", "grouped"])
        randomize(get_peft_model(Layers(), config), seed=seed).save_pretrained(tmp_path / name)
    a, b = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "b")
    for row, one, other in zip(compare(a, b).modules, a.modules, b.modules, strict=True):
        check(row, a.factors(one).dense(), b.factors(other).dense(), 4, 4)


@pytest.mark.slow
@given(
    seed=st.integers(0, 10**6),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    deficient=st.booleans(),
    energy=st.sampled_from([1.0, 0.9]),
)
@settings(max_examples=40, deadline=None)
def test_changing_the_gauge_changes_nothing(seed, ranks, deficient, energy):
    B, A = factors(ranks[0], seed=seed)
    if deficient:
        B[:, -1] = B[:, 0]
    other = {"x": factors(ranks[1], seed=seed + 1)}
    left, right = (orthonormal(ranks[0], ranks[0], seed + i) for i in (2, 3))
    sizes = torch.logspace(-2, 2, ranks[0], dtype=torch.float64)
    R, inverse = left * sizes @ right, right.mT / sizes @ left.mT
    plain = compare(view({"x": (B, A)}), view(other), energy=energy).modules[0]
    changed = compare(view({"x": (B @ R, inverse @ A)}), view(other), energy=energy).modules[0]
    swapped = compare(view(other), view({"x": (B @ R, inverse @ A)}), energy=energy).modules[0]
    assert plain.verdict == changed.verdict == swapped.verdict
    assert (plain.directions_a, plain.directions_b) == (changed.directions_a, changed.directions_b)
    for key in ("cosine", "output_overlap", "input_overlap", "share_a", "sigma_ratio", "output_angles", "input_angles"):
        value = getattr(plain, key)
        assert getattr(changed, key) == pytest.approx(value, rel=1e-6, abs=1e-6), key
        assert getattr(swapped, key) == pytest.approx(1 - value if key == "share_a" else value, rel=1e-6, abs=1e-6)


def test_an_adapter_beside_itself(write_adapter):
    one = write_adapter("a", {Q.format(i): factors(4, seed=i, dtype=torch.float32) for i in range(2)})
    report = compare(one, one)
    for row in report.modules:
        assert row.cosine == pytest.approx(1)
        assert max(row.output_angles + row.input_angles) < 1e-5
        assert (row.verdict, row.reason) == ("redundant", "aligned")
    assert report.total.cosine == pytest.approx(1)
    assert report.findings == ()


def near(values, expected):
    """Whether the mean is within four standard errors of what is expected, and these are small."""
    error = numpy.std(values) / math.sqrt(len(values))
    return abs(numpy.mean(values) - expected) < 4 * error < 0.8 * expected


@pytest.mark.slow
@pytest.mark.parametrize(("r_a", "r_b"), [(1, 1), (1, 8), (5, 8)])
def test_the_random_baselines_are_what_random_adapters_give(r_a, r_b):
    """The cosine has the standard deviation 1/√(d_out d_in) for any ranks; its mean size is between 2/π and √(2/π)
    times that, for ranks from 1 up."""
    modules, d_out, d_in = 400, 24, 20
    one = {f"m{i}": factors(r_a, d_out, d_in, seed=i) for i in range(modules)}
    other = {f"m{i}": factors(r_b, d_out, d_in, seed=modules + i) for i in range(modules)}
    report = compare(view(one), view(other))
    chance = report.modules[0].random_cosine
    assert chance == (d_out * d_in) ** -0.5
    cosines = [row.cosine for row in report.modules]
    assert near([c**2 for c in cosines], chance**2)
    size = numpy.mean(numpy.abs(cosines)) / chance
    slack = 4 * numpy.std(numpy.abs(cosines)) / chance / math.sqrt(modules)
    assert 2 / math.pi - slack < size < math.sqrt(2 / math.pi) + slack
    assert near([row.output_overlap for row in report.modules], report.modules[0].random_output_overlap)
    assert near([row.input_overlap for row in report.modules], report.modules[0].random_input_overlap)
    if r_a == r_b == 1:
        assert size == pytest.approx(2 / math.pi, abs=slack)


@pytest.mark.slow
def test_a_group_s_baseline_is_what_random_groups_give():
    totals = []
    for trial in range(150):
        scale = {0: 5.0, 1: 1.0, 2: 0.2}
        parts = []
        for side in (0, 1):
            seeds = {i: 1000 * trial + 10 * i + side for i in scale}
            parts.append(
                {f"m{i}": (factors(2, seed=seeds[i])[0] * s, factors(2, seed=seeds[i])[1]) for i, s in scale.items()}
            )
        totals.append(compare(*map(view, parts)).total)
    assert near([(total.cosine / total.random_cosine) ** 2 for total in totals], 1)


def test_summaries_are_of_the_updates_as_one_vector():
    one = {Q.format(i): factors(3, seed=i) for i in range(3)} | {Q.format(0).replace("q_", "v_"): factors(2, 5, 9)}
    other = {name: factors(2, B.shape[0], seed=9 + i) for i, (name, (B, A)) in enumerate(one.items())}
    a, b = view(one, lora_alpha=7), view(other)
    report = compare(a, b)
    flat = [
        torch.cat([v.factors(m).dense().flatten() for m in v.modules if "q_proj" in m.name or role == "all"])
        for role in ("query", "all")
        for v in (a, b)
    ]
    query = next(group for group in report.roles if group.name == "query")
    for group, first, second in ((query, *flat[:2]), (report.total, *flat[2:])):
        assert group.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-6)
        assert group.frobenius_norm_a == pytest.approx(float(first.norm()), rel=1e-6)
        assert group.share_a == pytest.approx(float(first.norm() / (first.norm() + second.norm())), rel=1e-6)
    assert [group.modules for group in report.layers] == [2, 1, 1]


def test_energy_leaves_the_smallest_directions_out():
    U, V = orthonormal(12, 8, 0), orthonormal(9, 8, 1)
    sigma = torch.tensor([10.0, 1e-3, 1e-3], dtype=torch.float64)
    one = {"x": (U[:, :3] * sigma, V[:, :3].mT)}
    other = {"x": (U[:, [0, 4, 5]] * sigma, V[:, [0, 4, 5]].mT)}
    assert compare(view(one), view(other)).modules[0].output_overlap == pytest.approx(1 / 3)
    assert compare(view(one), view(other), energy=0.99).modules[0].output_overlap == pytest.approx(1)


def test_verdicts_of_known_pairs():
    U, V = orthonormal(24, 8, 0), orthonormal(20, 8, 1)
    B, A = U[:, :4] * 2, V[:, :4].mT
    pairs = {
        "same": (B * 1.5, A, "redundant", "aligned"),
        "opposite": (-B, A, "conflicting", "opposed"),
        "opposite_and_small": (-B / 50, A, "conflicting", "opposed"),
        "same_directions_other_map": (B, A.flip(0), "conflicting", "contested"),
        "apart": (U[:, 4:] * 2, V[:, 4:].mT, "safe", "apart"),
        "apart_and_small": (U[:, 4:] / 4, V[:, 4:].mT, "imbalanced", "uneven"),
        "same_and_small": (B / 10, A, "imbalanced", "uneven"),
        "same_outputs_alone": (B, V[:, 4:].mT, "safe", "apart"),
    }
    one = view(dict.fromkeys(pairs, (B, A)))
    other = view({name: pair[:2] for name, pair in pairs.items()})
    report = compare(one, other)
    assert {row.module_name: (row.verdict, row.reason) for row in report.modules} == {
        name: pair[2:] for name, pair in pairs.items()
    }
    assert sum(report.total.verdicts.values()) == len(pairs)
    assert set(report.total.verdicts) == set(VERDICTS)
    lenient = compare(one, other, imbalanced_above=100, conflicting_below=-1, contested_above=1, redundant_above=1)
    assert {row.verdict for row in lenient.modules} == {"safe"}


def test_a_cosine_within_chance_is_no_verdict():
    assert judge(-0.9, 0.5, 0.0, 1.0, Thresholds()) == ("safe", "apart")
    assert judge(-0.9, 0.2, 0.0, 1.0, Thresholds()) == ("conflicting", "opposed")
    assert judge(0.9, 0.5, 0.0, 1.0, Thresholds()) == ("safe", "apart")
    assert judge(0.9, 0.2, 0.0, 1.0, Thresholds()) == ("redundant", "aligned")


def codes(report):
    return [(finding.severity, finding.code, finding.module_name) for finding in report.findings]


def test_what_has_no_partner_is_said(write_adapter):
    good = {Q.format(i): factors(2, seed=i) for i in range(3)}
    wider = {Q.format(0): factors(2, d_out=13), Q.format(1): factors(3, seed=5), Q.format(9): factors(2)}
    one = write_adapter("a", good, base_model_name_or_path="here")
    other = write_adapter("b", wider, base_model_name_or_path="there")
    report = compare(one, other)
    assert codes(report) == [
        ("error", "shape_mismatch", Q.format(0)),
        ("warning", "different_base", None),
        ("warning", "only_in_one", None),
        ("warning", "only_in_one", None),
    ]
    assert "12 × 9" in report.findings[0].message
    assert "13 × 9" in report.findings[0].message
    assert report.only_a == (Q.format(2),)
    assert report.only_b == (Q.format(9),)
    assert [row.module_name for row in report.modules] == [Q.format(1)]
    nothing = compare(one, view({"other": factors(2)}))
    assert ("error", "nothing_in_common", None) in codes(nothing)
    assert nothing.has_errors
    assert nothing.total.cosine is None
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_kernels_of_other_shapes_are_a_mismatch():
    B, A = torch.randn(4, 2, 1, 1), torch.randn(2, 3, 3, 2)
    report = compare(view({"conv": (B, A)}), view({"conv": (B, A.mT.contiguous())}))
    assert codes(report) == [("error", "shape_mismatch", "conv")]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(side, value):
    good = {Q.format(i): factors(2, seed=i) for i in range(2)}
    bad = {name: (B.clone(), A.clone()) for name, (B, A) in good.items()}
    bad[Q.format(1)][1][0, 0] = value
    pair = [view(good), view(good)]
    pair[side] = view(bad)
    report = compare(*pair)
    assert codes(report) == [("error", "non_finite", Q.format(1))]
    assert f"{'AB'[side]}'s" in report.findings[0].message
    assert report.modules[1].verdict is None
    assert report.modules[0].verdict == "redundant"
    assert report.total.cosine == pytest.approx(1)
    json.dumps(report.to_dict(), allow_nan=False)


def test_updates_that_are_zero_or_overflow():
    B, A = factors(2, dtype=torch.float32)
    zero = compare(view({"x": (B, A)}), view({"x": (B * 0, A)}))
    assert codes(zero) == [("warning", "zero_update", "x")]
    (row,) = zero.modules
    assert (row.cosine, row.sigma_ratio, row.share_a, row.output_overlap) == (0, None, 1, None)
    assert (row.verdict, row.directions_b) == ("imbalanced", 0)
    json.dumps(zero.to_dict(), allow_nan=False)
    both = compare(view({"x": (B * 0, A)}), view({"x": (B * 0, A)})).modules[0]
    assert (both.verdict, both.share_a, both.sigma_ratio) == ("safe", 0, 1)
    report = compare(view({"x": (B * 1e30, A * 1e30)}), view({"x": (B, A)}))
    assert codes(report) == [("error", "non_finite", "x")]
    assert "overflows" in report.findings[0].message


def test_findings_of_the_adapters_say_which(write_adapter, tmp_path):
    broken = write_adapter("b", {"x": factors(2)}, r=3, rank_pattern={})
    report = compare(write_adapter("a", {"x": factors(2)}), broken)
    assert codes(report) == [("error", "rank_mismatch", "x")]
    assert report.findings[0].message.startswith("B: ")


@pytest.mark.slow
def test_other_types_have_their_low_rank_part_compared(tmp_path, randomize, tiny_llama):
    configs = {
        "plain": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "dora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
        "spec": SpecLoRAConfig(r=4, k=8, target_modules=["q_proj", "v_proj"]),
        "fisher": FisherLoRAConfig(r=4, r_q=2, target_modules=["q_proj", "v_proj"]),
    }
    for i, (name, config) in enumerate(configs.items()):
        randomize(get_peft_model(tiny_llama(), config), seed=i).save_pretrained(tmp_path / name)
    for name in ("dora", "spec", "fisher"):
        one, other = open_adapter(tmp_path / "plain"), open_adapter(tmp_path / name)
        report = compare(one, other)
        assert len(report.modules) == 4
        partial = name != "fisher"
        assert all(row.low_rank_part_only == partial for row in report.modules)
        assert codes(report) == ([("info", "low_rank_part_only", None)] if partial else [])
        for row, a, b in zip(report.modules, one.modules, other.modules, strict=True):
            check(row, one.factors(a).dense(), other.factors(b).dense(), row.rank_a, row.rank_b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0}, "`energy` must be a "),
        ({"energy": math.nan}, "`energy` must be a "),
        ({"conflicting_below": 0.1}, "`conflicting_below` must be between -1 and 0"),
        ({"redundant_above": 2}, "`redundant_above` must be between 0 and 1"),
        ({"contested_above": -1}, "`contested_above` must be between 0 and 1"),
        ({"imbalanced_above": 0.5}, "`imbalanced_above` must be between 1"),
    ],
)
def test_options_out_of_range(options, message):
    one = view({"x": factors(2)})
    with pytest.raises(ValueError, match=message):
        compare(one, one, **options)


def test_what_cannot_be_read(write_adapter, tmp_path):
    one = write_adapter("a", {"x": factors(2)})
    (tmp_path / "cut.safetensors").write_bytes((one / "adapter_model.safetensors").read_bytes()[:-5])
    for other in (tmp_path / "nowhere", tmp_path / "cut.safetensors", tmp_path):
        for pair in ((one, other), (other, one)):
            with pytest.raises(AdapterFileError):
                compare(*pair)
    with pytest.raises(TypeError, match="adapter on disk has no name"):
        compare(one, one, adapter_name_b="default")


@pytest.mark.slow
def test_it_is_shown_in_80_columns_with_markup_in_names(write_adapter):
    names = [Q.format(i) for i in range(32)] + [f"model.layers.{i}.mlp.[bold]x[/bold]" for i in range(32)]
    one, other = ({name: factors(4, seed=i + shift) for i, name in enumerate(names)} for shift in (0, 99))
    other[Q.format(3)] = (-one[Q.format(3)][0], one[Q.format(3)][1])
    report = compare(view(one), view(other))
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "[bold]x[/bold]" in text
    assert f"{Q.format(3)} conflicting (opposed)     -1        1" in text
    (line,) = [line for line in text.splitlines() if line.startswith("query ")]
    assert line.split()[1] == "32"


@pytest.mark.slow
def test_the_figure_is_written_as_a_png_file(tmp_path):
    one = view({Q.format(i): factors(2, seed=i) for i in range(3)})
    (picture,) = write_plots(compare(one, one), tmp_path / "plots")
    assert picture.name == "comparison.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_the_numbers_and_marks_chance():
    one, other = ({Q.format(i): factors(2, seed=i + shift) for i in range(3)} | {"x": factors(2)} for shift in (0, 9))
    report = compare(view(one), view(other))
    figure = report.plot()
    assert figure.get_suptitle() == "A: memory\nB: memory"
    maps = [axes for axes in figure.axes if axes.images]
    names = ("cosine", "output_overlap", "input_overlap", "share_a")
    for axes, name in zip(maps, names, strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["query", "x"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "–"]
        drawn = axes.images[0].get_array()
        assert float(drawn[0, 1]) == pytest.approx(getattr(report.modules[1], name))
        assert float(drawn[1, 3]) == pytest.approx(getattr(report.modules[3], name))
        assert drawn.mask[1, 0]
    marks = [line.get_ydata()[0] for axes in figure.axes for line in axes.lines if line.get_color() == "red"]
    assert marks == [report.total.random_output_overlap_mean, report.total.random_input_overlap_mean]


def test_without_common_modules_the_figure_says_so():
    figure = compare(view({"x": factors(2)}), view({"y": factors(2)})).plot()
    assert [text.get_text() for text in figure.texts][-1] == "no module with finite updates in both"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda B, A: (B.flip(0), A), ""),
        (lambda B, A: (-B, A), " --method ties --density 0.5"),
        (lambda B, A: (B / 15, A), " --weights 0.0625,0.938"),
    ],
)
def test_the_next_step_merges_as_the_verdicts_suggest(write_adapter, tmp_path, change, options):
    first = {Q.format(i): factors(2, seed=i, dtype=torch.float32) for i in range(2)}
    one = write_adapter("a b", first, r=2, rank_pattern={})
    other = write_adapter("c", {name: change(*pair) for name, pair in first.items()}, r=2, rank_pattern={})
    report = compare(one, other)
    (step,) = report.next_steps
    assert step == f"lorakit merge '{one}' {other} '{one}-merged'{options}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *shlex.split(step)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a b-merged" / "adapter_model.safetensors").exists()


def test_adapters_that_cannot_be_merged_have_no_next_step(write_adapter):
    one = write_adapter("a", {"x": factors(2)})
    assert compare(one, one).next_steps == ()
    assert compare(one, write_adapter("b", {"y": factors(2)})).next_steps == ()
    assert compare(view({"x": factors(2)}), one).next_steps == ()
    bases = [write_adapter(name, {"x": factors(2)}, base_model_name_or_path=name) for name in ("c", "d")]
    assert compare(*bases).next_steps == ()


def test_the_repr_is_short():
    one = view({Q.format(i): factors(2, seed=i) for i in range(30)})
    report = compare(one, one)
    assert repr(report).startswith("ComparisonReport: 30 modules compared: 30 redundant; cosine +1, by chance ±")
    assert len(repr(report)) < 500


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorakit", "compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_command(write_adapter, tmp_path):
    one = write_adapter("a", {Q.format(i): factors(2, seed=i) for i in range(2)})
    other = write_adapter("b", {Q.format(i): factors(3, seed=i + 5) for i in range(2)})
    done = run(one, other, "--json", "--energy", "0.9", "--plots", tmp_path / "plots")
    assert (done.returncode, done.stderr) == (0, "")
    assert_close_reports(json.loads(done.stdout), json.loads(json.dumps(compare(one, other, energy=0.9).to_dict())))
    assert (tmp_path / "plots" / "comparison.png").exists()
    done = run(one, other)
    assert done.returncode == 0
    assert "2 modules compared" in done.stdout
    apart = write_adapter("c", {"elsewhere": factors(2)})
    done = run(one, apart, "--json")
    assert done.returncode == 1
    assert [f["code"] for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"] == ["nothing_in_common"]


@pytest.mark.slow
def test_bad_input_and_wrong_usage(write_adapter, tmp_path):
    one = write_adapter("a", {"x": factors(2)})
    done = run(one, tmp_path / "nowhere", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lorakit: ")
    assert "Traceback" not in done.stderr
    for arguments in ((one,), (one, one, "--energy", "2"), (one, one, "--no")):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_the_commands_import_neither_transformers_nor_peft_nor_matplotlib(write_adapter, run_python):
    one = str(write_adapter("a", {Q.format(i): factors(2, seed=i) for i in range(2)}))
    for arguments in (["compare", one, one], ["alignment", one, "--json"]):
        code = f"""
            import io, sys
            from lorakit.cli.app import app
            out, sys.stdout = sys.stdout, io.StringIO()
            app({arguments!r}, standalone_mode=False)
            heavy = {{"transformers", "peft", "accelerate", "matplotlib", "huggingface_hub", "scipy"}}
            print(sorted(heavy & set(sys.modules)), file=out)
        """
        assert run_python(code).stdout.strip() == "[]"
