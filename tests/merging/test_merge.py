"""Merges against dense sums in float64, the papers' formulas entry by entry, and PEFT's own combinations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.merging import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def trained(tiny_llama, randomize, tmp_path):
    def make(config, name, base=None, seed=2):
        model = randomize(get_peft_model(tiny_llama() if base is None else base, config), seed=seed)
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


@pytest.fixture
def pair(trained):
    """Two adapters of different ranks, scalings, types and modules."""
    a = trained(LoraConfig(**FIRST, use_rslora=True, rank_pattern={"q_proj": 2}), "a")
    b = trained(FisherLoRAConfig(r=3, r_q=5, target_modules=["q_proj", "v_proj", "o_proj"]), "b", seed=3)
    return a, b


def updates(model, name="default"):
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    return {
        n: layer.get_delta_weight(name).detach().double().numpy()
        for n, layer in layers.items()
        if name in layer.lora_A or name in layer.lora_embedding_A
    }


def weighted_sum(models, weights):
    found = {}
    for model, weight in zip(models, weights, strict=True):
        for name, W in updates(model).items():
            found[name] = found.get(name, 0) + weight * W
    return found


def best(W, rank):
    U, S, Vh = np.linalg.svd(W)
    rank = min(rank, len(S))
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def loaded(tiny_llama, directory):
    assert json.loads((directory / CONFIG).read_text())["peft_type"] == "LORA"
    return updates(PeftModel.from_pretrained(tiny_llama(), directory))


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [2.0, -0.3], None])
def test_linear_is_the_exact_sum(pair, tiny_llama, tmp_path, weights, live):
    (a, a_path), (b, b_path) = pair
    report = merge([a if live else a_path, b_path], tmp_path / "out", weights=weights)
    expected = weighted_sum([a, b], weights or [0.5, 0.5])
    after = loaded(tiny_llama, tmp_path / "out")
    assert after.keys() == expected.keys() == {row.module_name for row in report.modules}
    for row in report.modules:
        W = expected[row.module_name]
        assert np.linalg.norm(after[row.module_name] - W) <= 1e-6 * np.linalg.norm(W)
        assert row.sources == 2 - ("o_proj" in row.module_name or "down_proj" in row.module_name)
        assert row.energy_kept == 1.0
        assert row.error < 1e-6
    assert "partial_modules" in {finding.code for finding in report.findings}
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_a_cut_sum_is_the_best_of_its_rank(pair, tiny_llama, tmp_path, method):
    (a, a_path), (b, b_path) = pair
    report = merge([a_path, b_path], tmp_path / "out", weights=[0.7, 0.4], rank=2, method=method)
    expected = weighted_sum([a, b], [0.7, 0.4])
    after = loaded(tiny_llama, tmp_path / "out")
    kept = total = 0.0
    for name, W in expected.items():
        assert np.linalg.norm(after[name] - best(W, 2)) <= 1e-5 * np.linalg.norm(W)
        kept, total = kept + np.linalg.norm(best(W, 2)) ** 2, total + np.linalg.norm(W) ** 2
    assert report.energy_kept == pytest.approx(kept / total, abs=1e-6)
    assert {row.kept_rank for row in report.modules} == {2}


def test_energy_keeps_that_share_in_every_module(pair, tmp_path):
    (a, a_path), (b, b_path) = pair
    expected = weighted_sum([a, b], [0.5, 0.5])
    ranks = {}
    for name, W in expected.items():
        squares = np.linalg.svd(W, compute_uv=False) ** 2
        ranks[name] = 1 + int((np.cumsum(squares) / squares.sum() < 0.7).sum())
    report = merge([a_path, b_path], tmp_path / "out", energy=0.7)
    assert report.r == max(ranks.values()) > min(ranks.values())
    assert all(row.kept_rank == min(report.r, row.rank) for row in report.modules)
    assert min(row.energy_kept for row in report.modules) >= 0.7
    compact = merge([a_path, b_path], tmp_path / "compact", energy=0.7, pad=False)
    assert {row.module_name: row.kept_rank for row in compact.modules} == ranks
    dense = merge([a_path, b_path], tmp_path / "dense", method="dare", density=1.0, energy=0.7)
    assert dense.r == report.r


@pytest.mark.slow
@pytest.mark.parametrize(("combination", "method"), [("cat", "linear"), ("svd", "svd")])
def test_peft_s_own_combinations_are_the_same(tiny_llama, randomize, trained, tmp_path, combination, method):
    _, a = trained(LoraConfig(**FIRST), "a")
    _, b = trained(LoraConfig(**FIRST | {"r": 3, "lora_alpha": 1}), "b", seed=3)
    model = PeftModel.from_pretrained(tiny_llama(), a, adapter_name="a")
    model.load_adapter(b, "b")
    model.add_weighted_adapter(["a", "b"], [0.6, 1.4], "c", combination_type=combination)
    merge([a, b], tmp_path / "out", weights=[0.6, 1.4], method=method)
    after = loaded(tiny_llama, tmp_path / "out")
    expected = updates(model, "c")
    assert after.keys() == expected.keys()
    for name, W in expected.items():
        assert np.linalg.norm(after[name] - W) <= 1e-5 * np.linalg.norm(W), name


def trimmed(W, density):
    """All but the `density` largest magnitudes set to zero."""
    order = np.argsort(-np.abs(W).ravel(), kind="stable")[: int(density * W.size)]
    kept = np.zeros(W.size)
    kept[order] = W.ravel()[order]
    return kept.reshape(W.shape)


def test_ties_is_the_paper_s_formula_cut_to_rank(pair, tiny_llama, tmp_path):
    (a, a_path), (b, b_path) = pair
    weights, density = [0.7, 1.2], 0.3
    report = merge([a_path, b_path], tmp_path / "out", weights=weights, method="ties", density=density, rank=40)
    merge([a_path, b_path], tmp_path / "cut", weights=weights, method="ties", density=density)
    after, cut = loaded(tiny_llama, tmp_path / "out"), loaded(tiny_llama, tmp_path / "cut")
    sources = [updates(a), updates(b)]
    for row in report.modules:
        name = row.module_name
        parts = [(trimmed(s[name], density), w) for s, w in zip(sources, weights, strict=True) if name in s]
        elected = np.sign(sum(part for part, _ in parts))
        agree = [(part, w, (np.sign(part) == elected) & (part != 0)) for part, w in parts]
        count = sum(mask.astype(int) for _, _, mask in agree)
        merged = sum(w * part * mask for part, w, mask in agree) / np.maximum(count, 1)
        assert np.linalg.norm(after[name] - merged) <= 1e-4 * np.linalg.norm(merged), name
        assert np.linalg.norm(cut[name] - best(merged, 5)) <= 1e-4 * np.linalg.norm(merged), name


@pytest.mark.slow
def test_dare_keeps_and_rescales_at_random_and_is_unbiased(trained, tiny_llama, tmp_path):
    model, a = trained(LoraConfig(r=2, target_modules=["down_proj"]), "a")
    W = updates(model)["model.layers.0.mlp.down_proj"]
    draws = []
    for seed in range(40):
        merge([a], tmp_path / "out", weights=[1.0], method="dare", density=0.5, rank=32, seed=seed)
        module = open_adapter(tmp_path / "out").modules[0]
        D = open_adapter(tmp_path / "out").factors(module).dense().double().numpy()
        ratio = D / W
        assert np.all((np.abs(ratio) < 1e-3) | (np.abs(ratio - 2) < 1e-3))
        draws.append(D)
    assert 0.45 < np.mean([np.mean(np.abs(D) > 0.5 * np.abs(W)) for D in draws]) < 0.55
    assert np.linalg.norm(np.mean(draws, 0) - W) < 0.25 * np.linalg.norm(W)  # 1/√40 = 0.16 expected


def test_seeds_are_deterministic_and_leave_the_global_state_alone(pair, tmp_path):
    paths = [path for _, path in pair]
    state = torch.random.get_rng_state()
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        report = merge(paths, tmp_path / name, method="dare", density=0.5, seed=seed)
        assert (report.seed, report.density) == (seed, 0.5)
    x, y, z = (load_file(tmp_path / name / WEIGHTS) for name in "xyz")
    assert all(torch.equal(x[key], y[key]) for key in x)
    assert not all(torch.equal(x[key], z[key]) for key in x)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_density_one_alone_is_the_adapter_itself(trained, tiny_llama, tmp_path, method):
    model, a = trained(LoraConfig(**FIRST), "a")
    merge([a], tmp_path / "out", weights=[1], method=method, density=1.0)
    for name, W in loaded(tiny_llama, tmp_path / "out").items():
        assert np.linalg.norm(updates(model)[name] - W) <= 1e-5 * np.linalg.norm(W)


def test_ranks_above_the_shape_are_recompressed(trained, tiny_llama, tmp_path):
    paths = [trained(LoraConfig(r=12, target_modules=["v_proj"]), str(i), seed=i)[1] for i in range(3)]
    report = merge(paths, tmp_path / "out", weights=[1, 1, 1])
    assert {row.kept_rank for row in report.modules} == {16}
    assert report.energy_kept == 1.0


def test_every_layout_is_merged(tmp_path, randomize):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.conv = nn.Conv2d(6, 10, (3, 2))
            self.linear = nn.Linear(6, 8)

    models = []
    for i in (0, 1):
        config = LoraConfig(r=2 + i, lora_alpha=3, target_modules=["embedding", "conv", "linear"])
        models.append(randomize(get_peft_model(Layers(), config), seed=i))
        models[i].save_pretrained(tmp_path / str(i))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out", weights=[0.3, 0.9])
    after = updates(PeftModel.from_pretrained(Layers(), tmp_path / "out"))
    for name, W in weighted_sum(models, [0.3, 0.9]).items():
        assert np.allclose(after[name], W, atol=1e-6), name


def test_adalora_takes_part(trained, tiny_llama, tmp_path):
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "v_proj"])
    model, ada = trained(config, "ada")
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    before = {n: m.get_delta_weight("default").detach().numpy() for n, m in layers.items()}
    other, plain = trained(LoraConfig(**FIRST), "plain", seed=5)
    merge([ada, plain], tmp_path / "out", weights=[1, 1])
    for name, W in loaded(tiny_llama, tmp_path / "out").items():
        assert np.allclose(W, before.get(name, 0) + updates(other)[name], atol=1e-5)


def test_half_precision_stays(trained, tmp_path):
    paths = [trained(LoraConfig(**FIRST), str(i), seed=i)[1] for i in range(2)]
    for path in paths:
        tensors = load_file(path / WEIGHTS)
        save_file({key: value.bfloat16() for key, value in tensors.items()}, path / WEIGHTS)
    merge(paths, tmp_path / "out", rank=3)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    save_file(tensors, paths[1] / WEIGHTS)
    merge(paths, tmp_path / "out", rank=3)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}


@pytest.mark.slow
def test_modules_to_save_are_carried_where_they_agree(trained, tiny_llama, token_ids, tmp_path):
    _, a = trained(LoraConfig(**FIRST, modules_to_save=["lm_head"]), "a")
    _, b = trained(LoraConfig(**FIRST), "b", seed=3)
    report = merge([b, a], tmp_path / "out")
    assert "carried_whole" in {finding.code for finding in report.findings}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    key = "base_model.model.lm_head.weight"
    assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, load_file(a / WEIGHTS)[key])
    _, c = trained(LoraConfig(**FIRST, modules_to_save=["lm_head"]), "c", seed=4)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ValueError, match=r"lm_head\.weight is trained in .*/a and in .*/c, with different values"):
        merge([a, c], tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    merge([a, a], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "one weight for each of 2 adapters; got 1"),
        ({"weights": [1.0, float("nan")]}, ValueError, "`weights` must be finite"),
        ({"method": "mean"}, ValueError, "one of linear, svd, ties, dare; got 'mean'"),
        ({"rank": 0}, ValueError, "positive integer; got 0"),
        ({"rank": -2}, ValueError, "positive integer"),
        ({"energy": 0}, ValueError, r"\(0, 1\]"),
        ({"energy": 1.5}, ValueError, r"\(0, 1\]"),
        ({"rank": 2, "energy": 0.5}, TypeError, "not both"),
        ({"method": "ties"}, TypeError, "`density` must be given for 'ties'"),
        ({"density": 0.5}, TypeError, "'linear' keeps all entries"),
        ({"method": "dare", "density": 0}, ValueError, r"`density` must be a number in \(0, 1\]; got 0"),
        ({"for_server": "lorax", "pad": False}, ValueError, "lorax, which needs one rank"),
    ],
)
def test_options_that_make_no_sense(pair, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        merge([path for _, path in pair], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_not_a_list(pair, tmp_path):
    with pytest.raises(TypeError, match="must be a list of adapters; got str"):
        merge(str(tmp_path / "a"), tmp_path / "out")
    with pytest.raises(ValueError, match="at least one"):
        merge([], tmp_path / "out")


@pytest.mark.slow
def test_adapters_of_other_models_and_kinds_are_refused(pair, trained, tiny_llama, tmp_path):
    (_, a), _ = pair
    before = snapshot(a)
    _, wide = trained(LoraConfig(**FIRST), "wide", tiny_llama(hidden_size=64))
    with pytest.raises(ValueError, match=r"not of one model: it is linear 32 × \(48,\) in .*/a, linear 64"):
        merge([a, wide], a, overwrite=True)
    kinds = {
        "SPECLORA": (SpecLoRAConfig(r=2, k=4, target_modules=["q_proj"]), None),
        "a DoRA magnitude": (LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), None),
        "a `lora_bias`": (LoraConfig(r=2, lora_bias=True, target_modules=["0"]), nn.Sequential(nn.Linear(3, 4))),
    }
    for i, (message, (config, base)) in enumerate(kinds.items()):
        _, other = trained(config, f"other{i}", base)
        with pytest.raises(UnsupportedModelError, match=message):
            merge([other, other], a, overwrite=True)
    _, biased = trained(LoraConfig(**FIRST, bias="all"), "biased", tiny_llama(attention_bias=True))
    with pytest.raises(ValueError, match="differ in `bias`"):
        merge([a, biased], a, overwrite=True)
    tensors = load_file(wide / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, wide / WEIGHTS)
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        merge([wide, wide], a, overwrite=True)
    assert snapshot(a) == before


def test_other_base_models_are_named(pair, tmp_path):
    paths = [path for _, path in pair]
    for i, path in enumerate(paths):
        config = json.loads((path / CONFIG).read_text()) | {"base_model_name_or_path": f"base{i}"}
        (path / CONFIG).write_text(json.dumps(config))
    report = merge(paths, tmp_path / "out")
    assert "base_models_differ" in {finding.code for finding in report.findings}


def test_tensors_are_written_over_an_adapter_only_when_asked(pair, tmp_path):
    paths = [path for _, path in pair]
    before = snapshot(paths[0])
    with pytest.raises(FileExistsError, match="the directory of the adapter itself"):
        merge(paths, paths[0])
    assert snapshot(paths[0]) == before
    assert merge(paths, tmp_path / "out").r == merge(paths, tmp_path / "out").r == 7


def test_the_report_has_the_sizes_of_all_sources(pair, tmp_path):
    paths = [path for _, path in pair]
    report = merge(paths, tmp_path / "out")
    sizes = [sum(t.nbytes for t in load_file(path / WEIGHTS).values()) for path in (*paths, tmp_path / "out")]
    assert (report.size_bytes_before, report.size_bytes) == (sum(sizes[:2]), sizes[2])
    assert (report.rank_before, report.vllm_max_lora_rank_before, report.vllm_max_lora_rank) == (5, 8, 8)
    assert f"0.5 · {paths[0]}" in report.headline
    assert report.plot().axes[0].get_title().endswith("r 7")
