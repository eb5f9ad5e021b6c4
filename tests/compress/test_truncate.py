"""Truncated adapters against numpy's float64 SVD of ΔW, and against what PEFT makes of the files."""

from __future__ import annotations

import errno
import json
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit.adapters.write_lora as writing
from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.adapters.edit_log import write_edits
from lorakit.adapters.stream import SafetensorsWriter
from lorakit.compress import truncate
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.spectral import LowRank
from lorakit.spectral.weighted import input_weighted, truncate_weighted

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UNEVEN = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 4.5}}
CONFIGS = {
    "plain": lambda: LoraConfig(r=6, lora_alpha=9, target_modules="all-linear"),
    "rslora": lambda: LoraConfig(r=6, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "patterns": lambda: LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules="all-linear",
        rank_pattern={"q_proj": 3, r"layers\.1\..*down_proj": 8},
        alpha_pattern={"v_proj": 4, r"^model\.layers\.0\.self_attn\.k_proj": 1},
    ),
    "fisherlora": lambda: FisherLoRAConfig(r=6, r_q=2, use_rslora=True),
}


@pytest.fixture
def trained(tiny_llama, randomize, tmp_path):
    def make(config, base=None, name="adapter", seed=2):
        model = randomize(get_peft_model(tiny_llama() if base is None else base, config), seed=seed)
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


def updates(model, name="default"):
    """ΔW of every adapted module as PEFT has it, in float64."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    return {n: layer.get_delta_weight(name).detach().double().numpy() for n, layer in layers.items()}


def optimal_error(W, rank):
    return np.sqrt((np.linalg.svd(W, compute_uv=False)[rank:] ** 2).sum())


def codes(report):
    return {finding.code for finding in report.findings}


def finding(report, code):
    return next(finding for finding in report.findings if finding.code == code)


def snapshot(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["directory", "file", "model"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_the_best_update_of_each_rank(trained, tiny_llama, tmp_path, name, source):
    model, directory = trained(CONFIGS[name]())
    adapter = {"directory": directory, "file": directory / WEIGHTS, "model": model}[source]
    before = updates(model)
    report = truncate(adapter, tmp_path / "out", max_rank=2)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    after = updates(loaded)
    rows = {row.module_name: row for row in report.modules}
    assert after.keys() == before.keys() == rows.keys()
    kept = total = 0.0
    for module, W in before.items():
        assert np.linalg.matrix_rank(after[module], tol=1e-5) == rows[module].kept_rank == 2
        error = np.linalg.norm(W - after[module])
        assert error <= optimal_error(W, 2) + 1e-5 * np.linalg.norm(W)
        share = 1 - optimal_error(W, 2) ** 2 / np.linalg.norm(W) ** 2
        assert rows[module].energy_kept == pytest.approx(share, abs=1e-6)
        assert rows[module].error < 1e-6
        kept, total = kept + share * np.linalg.norm(W) ** 2, total + np.linalg.norm(W) ** 2
    assert report.energy_kept == pytest.approx(kept / total, abs=1e-6)
    assert report.verified
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_given_for_each_module(trained, tiny_llama, tmp_path, name, pad):
    model, directory = trained(CONFIGS[name]())
    report = truncate(directory, tmp_path / "out", ranks={"q_proj": 1, r"layers\.1\..*": 2}, pad=pad)
    after = updates(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"))
    for row in report.modules:
        asked = 1 if "q_proj" in row.module_name else 2 if "layers.1." in row.module_name else row.rank
        assert row.kept_rank == asked
        W = updates(model)[row.module_name]
        assert np.linalg.norm(W - after[row.module_name]) <= optimal_error(W, asked) + 1e-5 * np.linalg.norm(W)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert "use_rslora" not in config
    stored = {module.name: module.rank for module in open_adapter(tmp_path / "out").modules}
    mixed = len({row.kept_rank for row in report.modules}) > 1
    assert report.compact == ("rank_pattern" in config) == ("compact" in codes(report)) == (mixed and not pad)
    assert set(stored.values()) == {report.r} if pad else stored == {r.module_name: r.kept_rank for r in report.modules}
    for module in open_adapter(tmp_path / "out").modules:  # a server that ignores the patterns reads the same scalings
        assert module.scaling == pytest.approx(config["lora_alpha"] / config["r"])


def test_modules_that_keep_rank_and_scaling_keep_their_entries(trained, tmp_path):
    _, directory = trained(CONFIGS["plain"]())
    truncate(directory, tmp_path / "out", ranks={"q_proj": 1})
    old, new = load_file(directory / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert old.keys() == new.keys()
    assert [key for key in old if not torch.equal(old[key], new[key])] == [key for key in old if "q_proj" in key]
    for key in old:
        if "q_proj" in key:  # the rest is padding
            assert not (new[key][1:] if "lora_A" in key else new[key][:, 1:]).any()


def test_padding_keeps_every_entry(trained, tmp_path):
    _, directory = trained(LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"], **UNEVEN))
    report = truncate(directory, tmp_path / "out", max_rank=99)
    old, new = load_file(directory / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for key in old:
        rank = old[key].shape["lora_B" in key]
        kept, rest = (new[key][:, :rank], new[key][:, rank:]) if "lora_B" in key else (new[key][:rank], new[key][rank:])
        assert torch.equal(kept, old[key])
        assert not rest.any()
    assert (report.r, report.lora_alpha) == (6, 9)
    assert report.parameters > report.parameters_before
    assert "more parameters than before" in finding(report, "little_saved").message


def test_every_layout_is_cut(saved_layers, tmp_path):
    model, directory = saved_layers
    before = {n: W.reshape(len(W), -1) for n, W in updates(model).items()}
    truncate(directory, tmp_path / "out", ranks=2)
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "out")
    for name, W in updates(again).items():
        W = W.reshape(len(W), -1)
        error = np.linalg.norm(W - before[name])
        assert error == pytest.approx(optimal_error(before[name], 2), abs=1e-5 * np.linalg.norm(W)), name


@pytest.fixture
def saved_layers(tmp_path, randomize):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.conv = nn.Conv2d(6, 10, (3, 2))
            self.linear = nn.Linear(6, 8)

    config = LoraConfig(r=4, lora_alpha=3, target_modules=["embedding", "conv", "linear"])
    model = randomize(get_peft_model(Layers(), config))
    model.save_pretrained(tmp_path / "layers")
    return model, tmp_path / "layers"


def energies(model):
    return {name: np.linalg.svd(W, compute_uv=False) ** 2 for name, W in updates(model).items()}


def smallest_rank(squares, share):
    return 1 + int((np.cumsum(squares) / squares.sum() < share).sum())


def test_energy_chooses_the_smallest_rank_that_keeps_that_share_in_every_module(trained, tmp_path):
    model, directory = trained(CONFIGS["plain"]())
    report = truncate(directory, tmp_path / "out", energy=0.8)
    ranks = [smallest_rank(squares, 0.8) for squares in energies(model).values()]
    assert min(ranks) < max(ranks)
    assert {row.kept_rank for row in report.modules} == {report.r} == {max(ranks)}
    assert min(row.energy_kept for row in report.modules) >= 0.8
    assert truncate(directory, tmp_path / "all", energy=1.0).energy_kept == 1.0


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_energy_of_the_total_may_keep_less_in_a_module(trained, tmp_path, share):
    model, directory = trained(CONFIGS["patterns"]())
    report = truncate(directory, tmp_path / "out", energy=share, energy_of="total")
    total = np.sum([np.pad(squares, (0, 48 - len(squares))) for squares in energies(model).values()], axis=0)
    assert report.r == smallest_rank(total, share)
    assert report.energy_kept >= share
    below = truncate(directory, tmp_path / "below", max_rank=max(1, report.r - 1))
    assert report.r == 1 or below.energy_kept < share


def test_energy_of_each_module_on_request(trained, tmp_path):
    model, directory = trained(CONFIGS["plain"]())
    report = truncate(directory, tmp_path / "out", energy=0.8, per_module=True)
    for row in report.modules:
        assert row.kept_rank == smallest_rank(energies(model)[row.module_name], 0.8)
        assert row.energy_kept >= 0.8
    assert "PEFT ≥ 0.15 and vLLM ≥ 0.33" in finding(report, "compact").message


def size_of(directory):
    return sum(t.numel() for t in load_file(directory / WEIGHTS).values())


@pytest.mark.parametrize("budget", [2000, "2k", "8KB"])
@pytest.mark.parametrize("name", ["plain", "patterns"])
def test_a_budget_is_spent_on_one_rank_as_written(trained, tmp_path, name, budget):
    model, directory = trained(CONFIGS[name]())
    report = truncate(directory, tmp_path / "out", budget=budget)
    each = sum(W.shape[0] + W.shape[1] for W in updates(model).values())
    assert report.r == 2000 // each
    assert report.parameters == size_of(tmp_path / "out") == report.r * each


@pytest.mark.parametrize("budget", [1500, "1.5k", "6KB"])
def test_a_budget_is_spent_module_by_module_on_request(trained, tmp_path, budget):
    _, directory = trained(CONFIGS["plain"]())
    report = truncate(directory, tmp_path / "out", budget=budget, per_module=True)
    assert report.parameters == size_of(tmp_path / "out") <= 1500
    assert report.parameters > 1500 - 80  # no unit of the largest module fits
    assert min(row.kept_rank for row in report.modules) >= 1


def test_a_rank_that_servers_take_is_filled_with_what_there_is(trained, tmp_path):
    _, directory = trained(LoraConfig(r=20, target_modules=["q_proj", "down_proj"]))
    energetic = truncate(directory, tmp_path / "out", energy=0.6, for_server="lorax")
    assert energetic.r in (8, 16)
    assert {row.kept_rank for row in energetic.modules} == {energetic.r}
    bounded = truncate(directory, tmp_path / "out", max_rank=9, for_server=["tgi", "ollama"])
    assert (bounded.r, {row.kept_rank for row in bounded.modules}) == (16, {9})
    budget = truncate(directory, tmp_path / "out", budget=bounded.parameters - 1, for_server="tgi")
    assert budget.r == 8
    with pytest.raises(ValueError, match="`budget` must cover rank 8 in all 4 modules"):
        truncate(directory, tmp_path / "out", budget=600, for_server="tgi")


def test_little_saved_says_what_saves_more(trained, tmp_path):
    _, directory = trained(CONFIGS["plain"]())
    report = truncate(directory, tmp_path / "out", energy=0.999)
    message = finding(report, "little_saved").message
    assert "Only 0.0% of the factors' parameters were saved" in message
    claimed = re.search(r"`max_rank=3`, which keeps (\S+)% of the energy, saves (\d+)%", message)
    half = truncate(directory, tmp_path / "half", max_rank=3)
    assert half.energy_kept == pytest.approx(float(claimed[1]) / 100, abs=6e-4)
    assert 1 - half.parameters / half.parameters_before == pytest.approx(float(claimed[2]) / 100, abs=6e-3)
    assert "little_saved" not in codes(half)


def test_sizes_and_tiers_are_those_of_the_files(trained, tmp_path):
    _, directory = trained(LoraConfig(r=20, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    config = json.loads((directory / CONFIG).read_text()) | {"base_model_name_or_path": "b ase"}
    (directory / CONFIG).write_text(json.dumps(config))
    report = truncate(directory, tmp_path / "out", max_rank=7)
    for path, size in ((directory, report.size_bytes_before), (tmp_path / "out", report.size_bytes)):
        assert size == sum(t.nbytes for t in load_file(path / WEIGHTS).values())
    assert (report.vllm_max_lora_rank_before, report.vllm_max_lora_rank) == (32, 8)
    assert "rank 20 → 7" in report.headline
    assert "vLLM: --max-lora-rank 32 → 8" in report.details[1]
    assert f"lorakit compare {directory} {tmp_path / 'out'}" in report.next_steps
    assert any(step.startswith("vllm serve 'b ase' --enable-lora --max-lora-rank 8 ") for step in report.next_steps)
    assert repr(report).startswith("CompressReport: ")
    assert len(report.to_frame()) == len(report.modules)
    assert report.plot().axes[0].get_title().endswith("r 7")


def test_what_lies_beside_the_updates_is_carried_over(trained, tiny_llama, token_ids, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"], bias="all")
    model, directory = trained(config, tiny_llama(attention_bias=True))
    for source in (directory, model):
        report = truncate(source, tmp_path / "out", ranks=4)
        loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path / "out").eval()
        assert torch.allclose(loaded(token_ids).logits, model.eval()(token_ids).logits, atol=1e-5)
        new, old = load_file(tmp_path / "out" / WEIGHTS), load_file(directory / WEIGHTS)
        beside = [key for key in old if ".lora_" not in key]
        assert len(beside) > 1
        assert all(torch.equal(new[key], old[key]) for key in beside)
        assert report.parameters_beside == sum(old[key].numel() for key in beside)


def test_a_bias_of_the_adapter_is_scaled_with_it(trained, tmp_path):
    base = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "c": nn.Linear(6, 5)})
    config = LoraConfig(r=4, lora_alpha=4, alpha_pattern={"b": 12}, lora_bias=True, target_modules=["a", "b", "c"])
    model, directory = trained(config, base)
    truncate(directory, tmp_path / "out", ranks=2)
    plain = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "c": nn.Linear(6, 5)})
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out")
    for name in "abc":
        old, new = (m.base_model.model[name] for m in (model, loaded))
        expected = old.lora_B["default"].bias * old.scaling["default"]
        assert torch.allclose(new.lora_B["default"].bias * new.scaling["default"], expected)


def test_dora_keeps_its_magnitudes_and_says_what_the_energy_is_of(trained, tiny_llama, tmp_path):
    _, directory = trained(LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    report = truncate(directory, tmp_path / "out", ranks=2)
    assert all(row.low_rank_part_only for row in report.modules)
    assert codes(report) == {"low_rank_part_only"}
    old, new = load_file(directory / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert old.keys() == new.keys()
    assert all(torch.equal(new[key], old[key]) for key in old if "magnitude" in key)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert loaded.peft_config["default"].use_dora
    vector = loaded.base_model.model.model.layers[1].self_attn.q_proj.lora_magnitude_vector["default"].weight
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    assert torch.equal(vector, old[key])


def test_adalora_becomes_a_plain_lora(trained, tiny_llama, tmp_path):
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "v_proj"])
    model, directory = trained(config)
    expected = {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }
    truncate(directory, tmp_path / "out", ranks=4)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert type(loaded.peft_config["default"]) is LoraConfig
    for name, W in updates(loaded).items():
        assert np.allclose(W, expected[name], atol=1e-6)


def test_half_precision_is_kept_and_its_rounding_reported(trained, tiny_llama, tmp_path):
    _, directory = trained(CONFIGS["plain"]())
    path = directory / WEIGHTS
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    report = truncate(directory, tmp_path / "out", ranks=3)
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert 0 < max(row.error for row in report.modules) < 2**-8


def test_an_update_that_its_dtype_cannot_hold_is_refused(trained, tmp_path):
    _, directory = trained(LoraConfig(r=2, target_modules=["q_proj"]))
    path = directory / WEIGHTS
    save_file({k: (v * 0 + (6e4 if "lora_A" in k else 6e-8)).half() for k, v in load_file(path).items()}, path)
    config = json.loads((directory / CONFIG).read_text()) | {"alpha_pattern": {"layers.0.self_attn.q_proj": 1e16}}
    (directory / CONFIG).write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(AdapterFileError, match="float16|overflows"):
        truncate(directory, tmp_path / "out", ranks=1)
    assert not (tmp_path / "out").exists()


def test_the_record_of_surgery_goes_with_it(trained, tmp_path):
    _, directory = trained(CONFIGS["plain"]())
    write_edits(directory, [{"policy": "p"}])
    old = json.loads((directory / "lorakit_surgery.json").read_text())
    truncate(directory, tmp_path / "out", ranks=2)
    record = json.loads((tmp_path / "out" / "lorakit_surgery.json").read_text())
    assert record["edits"] == [{"policy": "p"}]
    assert record["weights_sha256"] not in (None, old["weights_sha256"])
    (directory / "lorakit_surgery.json").unlink()
    truncate(directory, tmp_path / "out", ranks=2)
    assert not (tmp_path / "out" / "lorakit_surgery.json").exists()


# Weighted


def root(C):
    values, vectors = np.linalg.eigh(C)
    return vectors * np.sqrt(np.clip(values, 0, None))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 6)),
    samples=st.integers(1, 12),
    rank=st.integers(1, 6),
)
def test_weighted_truncation_is_the_best_in_the_weighted_norm(seed, shape, samples, rank):
    d_out, d_in, r = shape
    generator = torch.Generator().manual_seed(seed)
    B, A, X = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((d_out, r), (r, d_in), (samples, d_in))
    )
    update = LowRank(B, A * torch.logspace(0, -2, r, dtype=torch.float64)[:, None], 0.7)
    W = update.dense().numpy()
    C = (X.mT @ X / samples).numpy()
    L = root(C)
    best = optimal_error(W @ L, rank)
    plain = np.linalg.norm((W - update.truncate(rank).dense().numpy()) @ L)
    scale = np.linalg.norm(W) * np.linalg.norm(L)
    for given_ in ({"activations": X}, {"second_moment": torch.from_numpy(C)}):
        seen = input_weighted(update, **given_)
        singular = np.linalg.svd(W @ L, compute_uv=False)[: len(seen.singular_values())]
        assert np.allclose(seen.singular_values()[: len(singular)].numpy(), singular, atol=1e-7 * scale)
        cut = truncate_weighted(update, seen, rank).dense().numpy()
        error = np.linalg.norm((W - cut) @ L)
        assert np.linalg.matrix_rank(cut, tol=1e-9 * scale) <= rank
        assert error == pytest.approx(best, abs=1e-6 * scale)
        assert error <= plain + 1e-6 * scale


def test_ranks_that_the_inputs_do_not_see_go_to_the_plain_best():
    torch.manual_seed(5)
    update = LowRank(torch.randn(8, 5).double(), torch.randn(5, 7).double())
    x = torch.randn(1, 7).double()
    cut = truncate_weighted(update, input_weighted(update, activations=x), 3)
    W, X = update.dense(), cut.dense()
    assert torch.allclose(X @ x[0], W @ x[0])
    u = (W @ x[0] / (W @ x[0]).norm()).numpy()
    rest = W.numpy() - np.outer(u, u) @ W.numpy()
    assert np.linalg.norm(W - X) == pytest.approx(optimal_error(rest, 2), rel=1e-6)
    nothing = truncate_weighted(update, input_weighted(update, second_moment=torch.zeros(7, 7)), 2)
    assert torch.allclose(nothing.dense(), update.truncate(2).dense())


@pytest.mark.slow
def test_calibrated_adapters(trained, tiny_llama, tmp_path):
    model, directory = trained(LoraConfig(r=6, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    inputs = {m.name: torch.randn(50, m.d_in) * torch.logspace(0, -2, m.d_in) for m in open_adapter(directory).modules}
    moments = {name: X.mT @ X / len(X) for name, X in inputs.items()}
    reports = [
        truncate(directory, tmp_path / "x", energy=0.9, activations=inputs),
        truncate(directory, tmp_path / "c", energy=0.9, second_moments=moments),
    ]
    plain = truncate(
        directory, tmp_path / "plain", ranks={row.module_name: row.kept_rank for row in reports[0].modules}
    )
    for report, out in zip(reports, ("x", "c"), strict=True):
        after = updates(PeftModel.from_pretrained(tiny_llama(), tmp_path / out))
        without = updates(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain"))
        for row in report.modules:
            W, L = updates(model)[row.module_name], root(moments[row.module_name].double().numpy())
            error, total = np.linalg.norm((W - after[row.module_name]) @ L), np.linalg.norm(W @ L)
            assert error == pytest.approx(optimal_error(W @ L, row.kept_rank), abs=1e-5 * total)
            assert error < np.linalg.norm((W - without[row.module_name]) @ L)
            assert row.weighted_energy_kept == pytest.approx(1 - (error / total) ** 2, abs=1e-5)
            share = 1 - (np.linalg.norm(W - after[row.module_name]) / np.linalg.norm(W)) ** 2
            assert row.energy_kept == pytest.approx(share, abs=1e-5)
        assert report.energy_kept < plain.energy_kept


def test_bad_inputs_of_weighted_truncation(trained, tmp_path):
    _, directory = trained(LoraConfig(r=2, target_modules=["q_proj"]))
    names = [module.name for module in open_adapter(directory).modules]
    eye = {name: torch.eye(32) for name in names}

    def cut(**inputs):
        return truncate(directory, tmp_path / "out", ranks=1, **inputs)

    bad = [
        ({"activations": eye, "second_moments": eye}, TypeError, "not both"),
        ({"activations": {names[0]: torch.eye(32)}}, ValueError, "every module"),
        ({"activations": eye | {"other": torch.eye(32)}}, ValueError, "'other'"),
        ({"activations": dict.fromkeys(names, torch.zeros(3, 31))}, ValueError, r"\(n, 32\); got \(3, 31\)"),
        ({"activations": dict.fromkeys(names, torch.full((3, 32), float("nan")))}, ValueError, "finite"),
        ({"activations": dict.fromkeys(names, torch.ones(3, 32, dtype=torch.long))}, TypeError, "floating"),
        ({"second_moments": dict.fromkeys(names, torch.zeros(3, 32))}, ValueError, r"\(32, 32\); got \(3, 32\)"),
        ({"second_moments": dict.fromkeys(names, torch.randn(32, 32))}, ValueError, "symmetric"),
        ({"second_moments": dict.fromkeys(names, -torch.eye(32))}, ValueError, "semidefinite"),
        ({"second_moments": dict.fromkeys(names, torch.eye(32) * float("inf"))}, ValueError, "finite"),
    ]
    for inputs, error, message in bad:
        with pytest.raises(error, match=message):
            cut(**inputs)
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    ("criteria", "error", "message"),
    [
        ({}, TypeError, "Exactly one of `ranks`, `energy`, `budget`, `max_rank`"),
        ({"ranks": 2, "energy": 0.9}, TypeError, "Exactly one"),
        ({"ranks": 7}, ValueError, "`max_rank` only bounds"),
        ({"ranks": 0}, ValueError, "positive integer; got 0"),
        ({"ranks": -1}, ValueError, "positive integer"),
        ({"ranks": True}, ValueError, "positive integer"),
        ({"ranks": {"q_proj": 0}}, ValueError, "positive integer; got 0"),
        ({"ranks": {"q_proj": 7}}, ValueError, "must not exceed"),
        ({"ranks": {"nothing": 2}}, ValueError, "'nothing', which matches no module"),
        ({"ranks": {"q_(": 2}}, ValueError, "no regular expression"),
        ({"max_rank": 0}, ValueError, "`max_rank` must be a positive integer"),
        ({"energy": 0}, ValueError, r"\(0, 1\]"),
        ({"energy": 1.1}, ValueError, r"\(0, 1\]"),
        ({"energy": float("nan")}, ValueError, r"\(0, 1\]"),
        ({"budget": 10}, ValueError, "must cover rank 1 in all 14 modules"),
        ({"budget": 10, "per_module": True}, ValueError, "must cover rank 1 in all 14 modules"),
        ({"energy": 0.5, "energy_of": "sum"}, ValueError, "one of module, total; got 'sum'"),
        ({"max_rank": 2, "energy_of": "total"}, TypeError, "is for `energy`"),
        ({"ranks": 2, "per_module": True}, TypeError, "use `pad=False`"),
        ({"ranks": 2, "for_server": "vllm,nginx"}, ValueError, "must be among peft, .*; got 'vllm,nginx'"),
        ({"ranks": 2, "for_server": "lorax", "pad": False}, ValueError, "lorax, which needs one rank"),
        ({"energy": 0.5, "for_server": "tgi", "per_module": True}, ValueError, "tgi, which needs one rank"),
        ({"ranks": 2, "for_server": "mlx"}, UnsupportedModelError, "mlx reads no PEFT directory"),
        ({"budget": "much"}, ValueError, "`budget` must be"),
    ],
)
def test_criteria_that_cannot_be_met(trained, tmp_path, criteria, error, message):
    _, directory = trained(CONFIGS["plain"]())
    before = snapshot(directory)
    with pytest.raises(error, match=message):
        truncate(directory, directory, **criteria, overwrite=True)
    assert snapshot(directory) == before


def break_nan(tensors, config):
    next(iter(tensors.values()))[0, 0] = float("nan")


def break_half(tensors, config):
    del tensors[next(key for key in tensors if "lora_B" in key)]


def break_saved(tensors, config):
    config["modules_to_save"] = ["lm_head"]
    tensors["base_model.model.lm_head.weight"] = torch.full((3, 3), float("inf"))


def break_all(tensors, config):
    tensors.clear()


BROKEN = {
    "NaN": (break_nan, AdapterFileError, "NaN or infinite"),
    "missing half": (break_half, AdapterFileError, "lora_B is missing"),
    "infinite module to save": (break_saved, AdapterFileError, "lm_head.weight has NaN or infinite"),
    "empty": (break_all, AdapterFileError, "no tensor is named like"),
    "unknown type": (lambda t, c: c.update(peft_type="LOHA"), UnsupportedModelError, "LOHA"),
    "PiSSA": (lambda t, c: c.update(init_lora_weights="pissa"), UnsupportedModelError, "changed the base weights"),
    "QALoRA": (lambda t, c: c.update(use_qalora=True), UnsupportedModelError, "use_qalora"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters_are_refused_and_the_target_is_untouched(trained, tmp_path, name):
    _, other = trained(CONFIGS["patterns"](), name="out")
    _, directory = trained(CONFIGS["plain"]())
    tensors, config = load_file(directory / WEIGHTS), json.loads((directory / CONFIG).read_text())
    change, error, message = BROKEN[name]
    change(tensors, config)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config))
    before = snapshot(other)
    with pytest.raises(error, match=message):
        truncate(directory, other, ranks=2, overwrite=True)
    assert snapshot(other) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_speclora_and_what_has_no_config_are_refused(trained, tmp_path):
    model, directory = trained(SpecLoRAConfig(r=3, k=5, target_modules=["q_proj"]))
    for source in (directory, model):
        with pytest.raises(UnsupportedModelError, match=r"SPECLORA.*to_lora"):
            truncate(source, tmp_path / "out", ranks=2)
    (tmp_path / "bare").mkdir()
    os.rename(directory / WEIGHTS, tmp_path / "bare" / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        truncate(tmp_path / "bare" / WEIGHTS, tmp_path / "out", ranks=2)
    base = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))
    _, directory = trained(LoraConfig(r=4, target_modules=["0"]), base)
    with pytest.raises(UnsupportedModelError, match="grouped convolution"):
        truncate(directory, tmp_path / "out", ranks=2)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_target(trained, tmp_path):
    _, directory = trained(CONFIGS["plain"]())
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError):
        truncate(directory, tmp_path / "out", ranks=2)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_target_may_be_the_source_and_keeps_its_other_files(trained, tiny_llama, tmp_path):
    _, directory = trained(CONFIGS["plain"]())
    (directory / "notes").mkdir()
    (directory / "notes" / "a.txt").write_text("a")
    card = (directory / "README.md").read_text()
    before = snapshot(directory)
    with pytest.raises(FileExistsError, match="the directory of the adapter itself.*`overwrite=True`"):
        truncate(directory, directory, ranks=2)
    assert snapshot(directory) == before
    truncate(directory, directory, ranks=2, overwrite=True)
    assert (directory / "notes" / "a.txt").read_text() == "a"
    assert (directory / "README.md").read_text().startswith(card.rstrip())
    for name, W in updates(PeftModel.from_pretrained(tiny_llama(), directory)).items():
        assert np.linalg.matrix_rank(W, tol=1e-5) == 2, name


def test_what_was_written_wrongly_never_takes_its_place(trained, tmp_path, monkeypatch):
    _, directory = trained(CONFIGS["plain"]())
    write = SafetensorsWriter.write

    def flawed(self, key, tensor):
        write(self, key, tensor * 1.001 if "layers.1.self_attn.v_proj.lora_B" in key else tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", flawed)
    with pytest.raises(AdapterFileError, match="with an error of"):
        truncate(directory, tmp_path / "out", ranks=2)
    assert not (tmp_path / "out").exists()
    truncate(directory, tmp_path / "out", ranks=2, verify=False)
    assert (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_leaves_the_target_as_it_was(trained, tmp_path, monkeypatch, code):
    _, other = trained(CONFIGS["patterns"](), name="out")
    _, directory = trained(CONFIGS["plain"]())
    before = snapshot(other)

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    for owner, part in ((SafetensorsWriter, "__init__"), (SafetensorsWriter, "write"), (writing, "write_config")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, part, fail)
            with pytest.raises(OSError, match=os.strerror(code)):
                truncate(directory, other, ranks=2, overwrite=True)
        assert snapshot(other) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_model_with_merged_embeddings_is_refused(tiny_llama, tmp_path, randomize):
    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens"])))
    report = truncate(model, tmp_path / "out", ranks=2)
    assert report.parameters_beside == 64 * 32  # PEFT saves the base weight of an adapted embedding
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="unmerge first"):
        truncate(model, tmp_path / "again", ranks=2)
    assert not (tmp_path / "again").exists()


def test_the_adapter_named_is_the_one_cut(trained, tmp_path):
    model, directory = trained(LoraConfig(r=4, target_modules=["q_proj"]))
    model.load_adapter(directory, "other")
    for layer in model.base_model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("other", 3.0)  # the present scaling counts
    truncate(model, tmp_path / "out", ranks=2, adapter_name="other")
    expected = updates(model, "other")
    adapter = open_adapter(tmp_path / "out")
    for module in adapter.modules:
        W = expected[module.name]
        error = np.linalg.norm(adapter.factors(module).dense().double().numpy() - W)
        assert error == pytest.approx(optimal_error(W, 2), abs=1e-5 * np.linalg.norm(W))
    with pytest.raises(ValueError, match="`adapter_name` must be one of"):
        truncate(model, tmp_path / "out", ranks=2, adapter_name="nobody")
    with pytest.raises(TypeError, match="`adapter_name` selects an adapter of a PeftModel"):
        truncate(directory, tmp_path / "out", ranks=2, adapter_name="other")
