"""Effective ranks of weights and updates, against numpy's float64 SVDs."""

from __future__ import annotations

import copy
import json
import math

import numpy
import pytest
import torch
from closeness import assert_close_reports
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from lorakit import SpecLoRAConfig
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.lens import rank_correlation


def effective_rank(matrix):
    sigma = numpy.linalg.svd(matrix, compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 1e-12]
    return math.exp(-(p * numpy.log(p)).sum())


def codes(report):
    return [(finding.severity, finding.code) for finding in report.findings]


def check_group(group, rows, pairs):
    names = [row.module_name for row in rows]
    x, y = ([pairs[name][i] for name in names] for i in range(2))
    assert group.modules == len(names)
    assert group.pretrained_mean == pytest.approx(numpy.mean(x), rel=1e-4)
    assert group.adapter_mean == pytest.approx(numpy.mean(y), rel=1e-4)
    assert group.pearson == pytest.approx(numpy.corrcoef(x, y)[0, 1], abs=1e-3)
    random = [row.random_effective_rank for row in rows]
    assert group.random_mean == pytest.approx(numpy.mean(random))
    assert group.random_pearson == pytest.approx(numpy.corrcoef(x, random)[0, 1], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_against_numpy_for_all_sources_of_weights_and_adapters(tmp_path, randomize, tiny_llama, updates, dtype):
    config = LoraConfig(r=3, target_modules="all-linear", use_rslora=True)
    base = tiny_llama(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    base.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = randomize(get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False))
    model.save_pretrained(tmp_path / "adapter")
    pairs = {
        name: (effective_rank(base.get_submodule(name).weight.detach().double().numpy()), effective_rank(update))
        for name, update in updates(model).items()
    }
    sources = [
        (model, None),
        (model, tmp_path / "base"),
        (tmp_path / "adapter", base),
        (tmp_path / "adapter", model),
        (str(tmp_path / "adapter"), str(tmp_path / "whole" / "model.safetensors")),
    ]
    for adapter, source in sources:
        report = rank_correlation(adapter, source)
        assert report.findings == ()
        assert not report.dequantized
        assert {row.module_name for row in report.modules} == set(pairs)
        for row in report.modules:
            pretrained, update = pairs[row.module_name]
            assert row.pretrained_effective_rank == pytest.approx(pretrained, rel=1e-4)
            assert row.adapter_effective_rank == pytest.approx(update, rel=1e-4)
        check_group(report.total, report.modules, pairs)
        assert {group.name for group in report.roles} == {"query", "key", "value", "output", "gate", "up", "down"}
        for group in report.roles:
            rows = [row for row in report.modules if row.role == group.name]
            check_group(group, rows, pairs)
        json.dumps(report.to_dict(), allow_nan=False)


def plain_state(model):
    """The base model's own tensors under their own names."""
    state = model.get_base_model().state_dict()
    return {name.replace("base_layer.", ""): value for name, value in state.items() if "lora_" not in name}


def test_weights_of_every_layout(tmp_path, randomize, tiny_gpt2):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(17, 14)
            self.conv = nn.Conv2d(4, 12, 3)
            self.attention = nn.MultiheadAttention(8, 2)

    model = randomize(get_peft_model(Layers(), LoraConfig(r=2, target_modules=["embedding", "conv", "attention"])))
    base = model.get_base_model()
    weights = {
        "embedding": base.embedding.base_layer.weight,
        "conv": base.conv.base_layer.weight.flatten(1),
        "attention": base.attention.base_layer.in_proj_weight,
        "attention.base_layer.out_proj": base.attention.base_layer.out_proj.base_layer.weight,
    }
    fresh = Layers()
    fresh.load_state_dict(plain_state(model))
    save_file(fresh.state_dict(), tmp_path / "model.safetensors")
    for source in (None, fresh, tmp_path):
        report = rank_correlation(model, source)
        assert report.findings == ()
        assert {row.module_name for row in report.modules} == set(weights)
        for row in report.modules:
            expected = effective_rank(weights[row.module_name].detach().double().numpy())
            assert row.pretrained_effective_rank == pytest.approx(expected, rel=1e-4)
    gpt2 = randomize(get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)))
    report = rank_correlation(gpt2)
    assert report.findings == ()
    weight = gpt2.get_base_model().transformer.h[0].attn.c_attn.base_layer.weight
    assert report.modules[0].pretrained_effective_rank == pytest.approx(
        effective_rank(weight.detach().double().numpy()), rel=1e-4
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.integers(0, 50))
def test_the_correlation_against_numpy(tmp_path_factory, from_spectrum, in_memory, tails, seed):
    factors, tensors = {}, {}
    for i, tail in enumerate(tails):
        factors[f"m{i}"] = from_spectrum([1.0, 0.1 * tail, 0.05], d_out=6, d_in=5, seed=seed + i)
        generator = torch.Generator().manual_seed(seed + i)
        tensors[f"m{i}.weight"] = torch.randn(6, 5, generator=generator)
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_file(tensors, path)
    report = rank_correlation(in_memory(factors), path)
    y = [effective_rank((B @ A).numpy()) for B, A in factors.values()]
    x = [effective_rank(weight.double().numpy()) for weight in tensors.values()]
    if len(set(tails)) == 1:
        return
    assert report.total.pearson == pytest.approx(numpy.corrcoef(x, y)[0, 1], abs=1e-3)


def test_findings_for_missing_and_unfit_weights(tmp_path, from_spectrum, in_memory):
    names = [f"layers.{i}.q_proj" for i in range(7)]
    factors = {name: from_spectrum([2.0, 1.0 + i], d_out=6, d_in=5, seed=i) for i, name in enumerate(names)}
    factors[names[4]][0][0, 0] = math.nan
    factors[names[5]][0].zero_()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(6, 5, generator=generator) for name in names}
    del tensors[f"{names[1]}.weight"]
    tensors[f"{names[2]}.weight"] = torch.randn(6, 4, generator=generator)
    tensors[f"{names[3]}.weight"][2, 2] = math.inf
    save_file(tensors, tmp_path / "model.safetensors")
    report = rank_correlation(in_memory(factors), tmp_path)
    assert [(f.severity, f.code, f.module_name) for f in report.findings] == [
        ("error", "non_finite", names[4]),
        ("error", "shape_mismatch", names[2]),
        ("error", "non_finite", names[3]),
        ("warning", "untrained", names[5]),
        ("warning", "base_missing", None),
        ("warning", "left_out", None),
    ]
    assert names[1] in report.findings[4].message
    assert names[5] in report.findings[5].message
    known = [(row.pretrained_effective_rank is not None, row.adapter_effective_rank) for row in report.modules]
    assert [has for has, _ in known] == [True, False, False, False, True, True, True]
    assert (known[4][1], known[5][1]) == (None, 0.0)
    assert [row.counts for row in report.modules] == [True, False, False, False, False, False, True]
    assert report.total.modules == 2
    assert abs(report.total.pearson) == pytest.approx(1)
    json.dumps(report.to_dict(), allow_nan=False)
    elsewhere = rank_correlation(in_memory({"other": factors[names[0]]}), tmp_path)
    assert codes(elsewhere) == [("error", "base_missing")]
    assert (elsewhere.total.pearson, elsewhere.total.pretrained_mean) == (None, None)
    assert "there are none" in elsewhere.total.reason
    json.dumps(elsewhere.to_dict(), allow_nan=False)


def test_an_undefined_correlation_has_a_reason(tmp_path, from_spectrum, in_memory):
    B, A = from_spectrum([1.0, 0.5], d_out=6, d_in=5)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(6, 5, generator=generator) for _ in range(2))
    save_file(
        {"a.q_proj.weight": one, "b.q_proj.weight": other, "c.v_proj.weight": 3 * one},  # the same but for rounding
        tmp_path / "model.safetensors",
    )
    report = rank_correlation(in_memory({"a.q_proj": (B, A), "b.q_proj": (B, A), "c.v_proj": (B, A)}), tmp_path)
    roles = {group.name: group for group in report.roles}
    assert (roles["value"].pearson, roles["value"].reason) == (None, "it needs two modules; there is one")
    assert roles["query"].pearson is None
    assert "all updates have the same effective rank" in roles["query"].reason
    three = from_spectrum([1.0, 0.5, 0.1], d_out=6, d_in=5)
    report = rank_correlation(in_memory({"a.q_proj": (B, A), "c.v_proj": three}), tmp_path)
    assert "all weights have the same effective rank" in report.total.reason
    assert codes(report) == [("warning", "mixed_ranks")]


def test_speclora_low_rank_part_on_its_own_base(randomize, tiny_llama, updates):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=4, k=8, target_modules=["q_proj", "v_proj"])))
    report = rank_correlation(model)
    assert codes(report) == [("info", "low_rank_part_only")]
    base, expected = tiny_llama(), updates(model)
    for row in report.modules:
        weight = base.get_submodule(row.module_name).weight.detach().double().numpy()
        assert row.pretrained_effective_rank == pytest.approx(effective_rank(weight), rel=1e-4)
        assert row.adapter_effective_rank == pytest.approx(effective_rank(expected[row.module_name]), rel=1e-4)


def test_the_base_that_is_needed(tmp_path, randomize, tiny_llama, from_spectrum, in_memory):
    with pytest.raises(ValueError, match="`base` must be the adapter's base model, 'some/model': a directory"):
        rank_correlation(in_memory({"q_proj": from_spectrum([1.0])}, base_model_name_or_path="some/model"))
    with pytest.raises(AdapterFileError, match="nowhere"):
        rank_correlation(in_memory({"q_proj": from_spectrum([1.0])}), tmp_path / "nowhere")
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="unmerge first"):
        rank_correlation(model)
    model.unmerge_adapter()
    assert rank_correlation(model).total.modules == 2


def test_quantized_checkpoints_are_refused(tmp_path, from_spectrum, in_memory):
    adapter = in_memory({"a": from_spectrum([1.0], d_out=4, d_in=4), "b": from_spectrum([1.0], d_out=4, d_in=4)})
    for tensors in (
        {"a.weight": torch.ones(8, 1, dtype=torch.uint8)},
        {"a.qweight": torch.ones(4, 1, dtype=torch.int32)},
    ):
        save_file(tensors | {"b.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedModelError, match="has 1 quantized weights that the adapter adapts: a"):
            rank_correlation(adapter, tmp_path)


@pytest.mark.slow
def test_the_control_shows_a_correlation_from_widths_alone(tmp_path, in_memory):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.q_proj": (8 + 8 * i, 96) for i in range(8)}
    factors = {
        name: (torch.randn(d_out, 6, generator=generator), torch.randn(6, d_in, generator=generator))
        for name, (d_out, d_in) in shapes.items()
    }
    tensors = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    report = rank_correlation(in_memory(factors), tmp_path)
    assert report.total.pearson > 0.7
    assert report.total.random_pearson > 0.7
    assert_close_reports(rank_correlation(in_memory(factors), tmp_path), report)
    other = rank_correlation(in_memory(factors), tmp_path, seed=1)
    assert other.total.pearson == pytest.approx(report.total.pearson, rel=1e-5)
    assert other.total.random_pearson != pytest.approx(report.total.random_pearson, rel=1e-3)
    for row in report.modules:
        draws = [
            effective_rank(
                torch.randn(row.d_out, 6, generator=generator).double().numpy()
                @ torch.randn(6, row.d_in, generator=generator).double().numpy()
            )
            for _ in range(100)
        ]
        assert row.random_effective_rank == pytest.approx(numpy.mean(draws), abs=4 * numpy.std(draws))


class Codes(nn.Module):
    """A quantized layer of a kind that PEFT cannot dequantize."""

    def __init__(self, name):
        super().__init__()
        self.register_buffer(name, torch.ones(4, 4, dtype=torch.int8))


@pytest.mark.parametrize("name", ["weight", "qweight"])
def test_quantized_layers_that_peft_cannot_dequantize_are_refused(from_spectrum, in_memory, name):
    base = nn.ModuleDict({"a": Codes(name), "b": nn.Linear(4, 4)})
    adapter = in_memory({"a": from_spectrum([1.0], d_out=4, d_in=4), "b": from_spectrum([1.0], d_out=4, d_in=4)})
    with pytest.raises(UnsupportedModelError, match="1 adapted weights are quantized: a.*`dequantize=True`"):
        rank_correlation(adapter, base)
    with pytest.raises(UnsupportedModelError, match="PEFT cannot dequantize the weight of a Codes"):
        rank_correlation(adapter, base, dequantize=True)


def test_the_figure(tmp_path, randomize, tiny_llama):
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"])))
    report = rank_correlation(model)
    r, control = report.total.pearson, report.total.random_pearson
    text = f"Pearson r = {r:.2f} (random factors: {control:.2f})"
    assert report.headline == f"{report.path} on {report.base}: {text} over 4 modules"
    assert report.details[0].startswith("query (2): Pearson r = ")
    assert report.to_frame()["random_effective_rank"].tolist() == [row.random_effective_rank for row in report.modules]
    (axes,) = report.plot().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["query", "value", "random factors"]
    x, y = axes.lines[0].get_data()
    rows = [row for row in report.modules if row.role == "query"]
    assert list(x) == [row.pretrained_effective_rank for row in rows]
    assert list(y) == [row.adapter_effective_rank for row in rows]
    assert list(axes.lines[2].get_ydata()) == [row.random_effective_rank for row in report.modules]
    assert axes.get_title() == f"{report.path}: 4 modules, {text}"
