"""Capacity utilization before training, at random and trained, against numpy's spectra and PEFT's fresh adapters."""

from __future__ import annotations

import json
import math
import shlex
import statistics

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.lens import conditions

TARGETS = ["q_proj", "v_proj"]


def utilization(update, rank):
    sigma = numpy.linalg.svd(update, compute_uv=False)
    if not sigma[0]:
        return 0.0
    p = sigma / sigma.sum()
    p = p[p > 1e-12]
    return math.exp(-(p * numpy.log(p)).sum()) / rank


def gaussian(d_out, d_in, rank, draws=300):
    """Mean and standard deviation of the utilization of random factors, by numpy."""
    rng = numpy.random.default_rng(0)
    values = [
        utilization(rng.normal(0, rank**-0.25, (d_out, rank)) @ rng.normal(0, rank**-0.25, (rank, d_in)), rank)
        for _ in range(draws)
    ]
    return statistics.fmean(values), statistics.stdev(values)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_conditions(tmp_path, randomize, tiny_llama, updates, dtype):
    models = []
    for r in (2, 4):
        config = LoraConfig(r=r, target_modules=TARGETS, rank_pattern={"layers.1.self_attn.v_proj": 6}, use_rslora=True)
        models.append(randomize(get_peft_model(tiny_llama(dtype), config, autocast_adapter_dtype=False), seed=r))
        models[-1].save_pretrained(tmp_path / str(r))
    reports = conditions(models, draws=30), conditions([tmp_path / "2", str(tmp_path / "4")], draws=30)
    for report in reports:
        assert report.findings == ()
        for model, found in zip(models, report.adapters, strict=True):
            trained = {}
            for name, update in updates(model).items():
                row = next(row for row in found.modules if row.module_name == name)
                trained[name] = utilization(update, row.rank)
                mean, std = gaussian(*update.shape, row.rank)
                assert row.trained == pytest.approx(trained[name], rel=1e-5)
                assert row.init == 0
                assert row.random == pytest.approx(mean, abs=5 * std / math.sqrt(30))
                assert 0.5 * std < row.random_std < 1.6 * std
            total = found.total
            assert (total.modules, total.init) == (4, 0)
            assert total.trained == pytest.approx(numpy.mean(list(trained.values())), rel=1e-5)
            assert total.trained_std == pytest.approx(numpy.std(list(trained.values()), ddof=1), abs=1e-5)
            assert total.random == pytest.approx(statistics.fmean(row.random for row in found.modules))
            assert total.random_std < max(row.random_std for row in found.modules)
            gap = [numpy.mean([trained[name] for name in trained if name.endswith(leaf)]) for leaf in TARGETS]
            assert found.qv_gap["trained"] == pytest.approx(gap[0] - gap[1], abs=1e-5)
            assert found.qv_gap["init"] == 0
            roles = {group.name: group for group in found.roles}
            assert found.qv_gap["random"] == pytest.approx(roles["query"].random - roles["value"].random)
            assert {name: group.modules for name, group in roles.items()} == {"query": 2, "value": 2}
    assert [found.ranks for found in reports[0].adapters] == [(2, 6), (4, 6)]


def test_random_factors_of_low_rank_have_full_utilization_and_no_qv_gap(in_memory):
    names = [f"layers.{i}.{leaf}" for i in range(6) for leaf in TARGETS]
    zero = {name: (torch.zeros(800, 4), torch.zeros(4, 800)) for name in names}
    (found,) = conditions(in_memory(zero)).adapters
    assert found.total.random > 0.98
    assert abs(found.qv_gap["random"]) < 0.005
    assert found.total.trained == 0


def test_draws_depend_on_the_seed_alone(from_spectrum, in_memory):
    adapters = [in_memory({"q_proj": from_spectrum([1.0] * r)}, init_lora_weights=False) for r in (2, 5)]
    state = torch.get_rng_state()
    both = conditions(adapters)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert conditions(adapters) == both
    assert conditions(adapters[1]).adapters == both.adapters[1:]
    other = conditions(adapters, seed=1)
    assert other.adapters[0].modules[0].random != both.adapters[0].modules[0].random
    assert other.adapters[0].modules[0].init != both.adapters[0].modules[0].init
    alone = conditions(adapters, draws=1).adapters[0]
    assert (alone.modules[0].random_std, alone.total.random_std) == (None, None)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_every_condition_is_in_0_1_and_does_not_depend_on_the_scale(in_memory, r, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(9, r, generator=generator), torch.randn(r, 7, generator=generator)
    one, other = (conditions(in_memory({"q": (B * s, A)}), seed=seed).adapters[0].modules[0] for s in (1.0, scale))
    for value in (one.init, one.random, one.trained):
        assert 0 <= value <= 1 + 1e-6
    assert other.trained == pytest.approx(one.trained, rel=1e-5)
    assert other.random == one.random


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 14)
        self.linear = nn.Linear(12, 10)
        self.conv = nn.Conv2d(8, 12, 3)
        self.grouped = nn.Conv1d(8, 12, 3, groups=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*eva")
@pytest.mark.parametrize("init", [True, "gaussian", "Gaussian", "orthogonal", "eva", False])
def test_init_is_what_peft_makes(randomize, tiny_llama, updates, init):
    config = LoraConfig(
        r=6, target_modules="all-linear", rank_pattern={"v_proj": 4, "up_proj": 2}, init_lora_weights=init
    )
    fresh = get_peft_model(tiny_llama(), config)
    if init == "eva":  # data makes A, and B stays zero
        assert all(not update.any() for update in updates(fresh).values())
    ranks = {"v_proj": 4, "up_proj": 2}
    made = [
        utilization(update, ranks.get(name.rpartition(".")[2], 6)) if numpy.abs(update).max() > 1e-6 else 0.0
        for name, update in updates(fresh).items()
    ]
    (untrained,) = conditions(fresh).adapters
    trained = {module.module_name: module.trained for module in untrained.modules}
    assert [trained[name] for name in updates(fresh)] == pytest.approx(made, abs=1e-5)
    (found,) = conditions(randomize(fresh)).adapters
    assert found.init_reason is None
    assert found.total.init == pytest.approx(numpy.mean(made), abs=0.03)
    if init is False:
        assert found.total.init > 0.7
        assert all(row.init > 0 for row in found.modules)
    else:
        assert all(row.init == 0 for row in found.modules)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("init", [True, False])
def test_embeddings_and_convolutions(randomize, init):
    targets = ["embedding", "linear", "conv", "grouped"]
    model = randomize(get_peft_model(Layers(), LoraConfig(r=4, target_modules=targets, init_lora_weights=init)))
    (found,) = conditions(model).adapters
    assert found.init_reason is None
    assert sorted(row.module_name for row in found.modules) == sorted(targets)
    assert all((row.init == 0) == init for row in found.modules)
    assert all(0.5 < row.random <= 1 and 0.5 < row.trained <= 1 for row in found.modules)
    grouped = next(row for row in found.modules if row.module_name == "grouped")
    rng = numpy.random.default_rng(0)
    values = []
    for _ in range(300):
        B = numpy.zeros((12, 4))
        B[:6, :2], B[6:, 2:] = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
        values.append(utilization(B @ rng.normal(size=(4, 24)), 4))
    assert grouped.random == pytest.approx(statistics.fmean(values), abs=3 * statistics.stdev(values))


def test_init_has_every_modules_own_rank(in_memory):
    shapes = {"a": (9, 2, 8), "b": (9, 2, 8), "narrow": (3, 12, 8)}
    factors = {name: (torch.ones(d_out, r), torch.ones(r, d_in)) for name, (d_out, r, d_in) in shapes.items()}
    (found,) = conditions(in_memory(factors, init_lora_weights=False)).adapters
    init = {row.module_name: row.init for row in found.modules}
    assert 0 < init["narrow"] <= 3 / 12  # of rank 2 it would be 1/2 at least
    assert min(init["a"], init["b"]) >= 1 / 2


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "other"])
def test_inits_that_need_the_base_weight_have_no_init_condition(from_spectrum, in_memory, init):
    adapter = in_memory({"q_proj": from_spectrum([2.0, 1.0]), "v_proj": from_spectrum([1.0])}, init_lora_weights=init)
    report = conditions(adapter)
    (found,) = report.adapters
    assert repr(init) in found.init_reason
    assert "base weight" in found.init_reason
    assert (found.total.init, found.qv_gap["init"], found.modules[0].init) == (None, None, None)
    assert found.total.random > 0
    assert [finding.severity for finding in report.findings if finding.code == "no_init"] == ["info"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_inits_that_peft_refuses_or_that_are_unknown(tmp_path, from_spectrum, in_memory, write_adapter, tiny_llama):
    odd = conditions(in_memory({"q_proj": from_spectrum([1.0] * 3)}, init_lora_weights="orthogonal")).adapters[0]
    assert "rank to be even" in odd.init_reason
    bare = write_adapter("bare", {"q_proj": from_spectrum([1.0] * 3)})
    (bare / "adapter_config.json").unlink()
    report = conditions(bare / "adapter_model.safetensors")
    assert "config" in report.adapters[0].init_reason
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "ada")
    (ada,) = conditions(tmp_path / "ada").adapters
    assert "AdaLoRA" in ada.init_reason
    assert ada.total.random > 0.5


def test_zero_and_non_finite_updates(from_spectrum, in_memory):
    factors = {f"layers.{i}.{leaf}": from_spectrum([2.0, 1.0], seed=i) for i in range(3) for leaf in TARGETS}
    factors["layers.1.q_proj"][0].zero_()
    factors["layers.2.v_proj"][0][0, 0] = math.nan
    report = conditions(in_memory(factors, path="some adapter"))
    (found,) = report.adapters
    assert report.has_errors
    assert [(f.code, f.module_name) for f in report.findings] == [
        ("non_finite", "layers.2.v_proj"),
        ("untrained", "layers.1.q_proj"),
    ]
    assert all(finding.message.startswith("some adapter: ") for finding in report.findings)
    rows = {row.module_name: row for row in found.modules}
    assert "layers.2.v_proj" not in rows
    assert (rows["layers.1.q_proj"].trained, rows["layers.1.q_proj"].random > 0) == (0.0, True)
    p = numpy.array([2, 1]) / 3
    expected = math.exp(-(p * numpy.log(p)).sum()) / 2
    assert found.total.trained == pytest.approx(4 / 5 * expected)
    assert found.qv_gap["trained"] == pytest.approx(-expected / 3)
    json.dumps(report.to_dict(), allow_nan=False)
    nothing = conditions(in_memory({"q_proj": (torch.full((3, 1), math.nan), torch.ones(1, 3))}))
    assert (nothing.adapters[0].total, nothing.adapters[0].ranks, nothing.adapters[0].modules) == (None, None, ())
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_a_scaling_of_zero_makes_the_trained_update_zero(from_spectrum, in_memory):
    report = conditions(in_memory({"q_proj": from_spectrum([1.0] * 3)}, lora_alpha=0, alpha_pattern={}))
    (row,) = report.adapters[0].modules
    assert (row.trained, row.random > 0.7) == (0.0, True)
    assert [finding.code for finding in report.findings] == ["zero_update"]


def test_lorakit_methods(tmp_path, randomize, tiny_llama, updates):
    spec = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=4, k=8, target_modules=TARGETS)))
    fisher = randomize(get_peft_model(tiny_llama(), FisherLoRAConfig(r=6, r_q=2, r_v=6, target_modules=TARGETS)))
    fisher.save_pretrained(tmp_path)
    report = conditions([spec, tmp_path])
    assert [finding.code for finding in report.findings] == ["low_rank_part_only"]
    assert report.next_steps == (f"lorakit audit {shlex.quote(str(tmp_path))} --suggest-ranks",)
    assert [found.peft_type for found in report.adapters] == ["SPECLORA", "FISHERLORA"]
    assert [found.total.init for found in report.adapters] == [0, 0]
    assert [found.ranks for found in report.adapters] == [(4, 4), (2, 6)]
    for model, found in zip((spec, fisher), report.adapters, strict=True):
        expected = updates(model)
        for row in found.modules:
            assert row.trained == pytest.approx(utilization(expected[row.module_name], row.rank), rel=1e-5)


def test_invalid_arguments(from_spectrum, in_memory):
    with pytest.raises(ValueError, match="`adapters` must have at least one"):
        conditions([])
    for draws in (0, True, 1.5):
        with pytest.raises(ValueError, match="`draws` must be a positive integer"):
            conditions(in_memory({"q_proj": from_spectrum([1.0])}), draws=draws)


def test_the_figure(from_spectrum, in_memory):
    names = [f"layers.{i}.{leaf}" for i in range(3) for leaf in TARGETS]
    adapters = [in_memory({name: from_spectrum(range(r, 0, -1), seed=r) for name in names}) for r in (8, 2, 4)]
    report = conditions(adapters)
    below = sum(one.total.trained < one.total.random for one in report.adapters)
    assert report.headline == f"{below} of 3 adapters use less of their rank than random factors do"
    first = report.adapters[0].total
    assert f"CU init 0, random {first.random:.3g}, trained {first.trained:.3g}; Q–V gap +0.000" in report.details[0]
    assert [row["name"] for row in report.rows()] == ["all", "query", "value"] * 3
    assert report.next_steps == ()
    left, right = report.plot().axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["init", "random", "trained"]
    trained = left.containers[2].lines[0]
    assert list(trained.get_xdata()) == [2, 4, 8]
    order = [report.adapters[i].total.trained for i in (1, 2, 0)]
    assert list(trained.get_ydata()) == pytest.approx(order)
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["query", "value", "random"]
    solid = [line for line in right.lines if line.get_linestyle() == "-"]
    dashed = [line for line in right.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert len(solid) == len(dashed) == 2
    middle = [row.trained * 4 for row in report.adapters[2].modules if row.role == "query"]
    assert list(solid[0].get_ydata()) == pytest.approx(middle)
    assert "r = 4" in right.get_title()
    assert "r = 8" in report.plot(adapter=0).axes[1].get_title()
    with pytest.raises(IndexError):
        report.plot(adapter=3)
    without = conditions(in_memory({"q_proj": from_spectrum([1.0])}, init_lora_weights="pissa")).plot()
    assert [text.get_text() for text in without.axes[0].get_legend().get_texts()] == ["random", "trained"]
