"""Experts stacked in parameters, cut, merged and exported: PEFT loads what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

from lorakit import SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.compress import truncate
from lorakit.errors import UnsupportedModelError
from lorakit.export import to_lora
from lorakit.merging import merge
from lorakit.merging._combine import combiner

from .conftest import TARGETS, adapted, dense, loaded, logits, saved, wrappers

pytestmark = pytest.mark.slow


def updates(directory: str) -> dict[str, np.ndarray]:
    """Each stack's ΔW by module name, in float64."""
    modules = [module for module in open_adapter(directory).modules if module.experts is not None]
    return {module.name: dense(directory, module.path, 4, module.scaling) for module in modules}


def best(update: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(update, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"energy": 1.0, "per_module": True}, {"max_rank": 8}])
def test_at_full_rank_the_logits_stay(base, tmp_path, options):
    model = adapted(base)
    directory = saved(model, tmp_path / "a")
    for source in (directory, model):
        truncate(source, tmp_path / "b", **options, overwrite=True)
        torch.testing.assert_close(logits(loaded(base, tmp_path / "b")), logits(model), atol=2e-6, rtol=1e-5)
    assert (logits(model) - logits(base)).abs().max() > 0.01


@pytest.mark.parametrize("per_module", [False, True])
def test_every_expert_is_cut_to_its_own_best(base, tmp_path, per_module):
    directory = saved(adapted(base), tmp_path / "a")
    before = updates(directory)
    report = truncate(directory, tmp_path / "b", max_rank=1, per_module=per_module)
    after = updates(str(tmp_path / "b"))
    rows = {row.module_name: row for row in report.modules}
    for name, update in before.items():
        expected = best(update, 1)
        np.testing.assert_allclose(after[name], expected, atol=1e-5)
        assert rows[name].energy_kept == pytest.approx((expected**2).sum() / (update**2).sum(), rel=1e-5)
        assert (rows[name].experts, rows[name].kept_rank) == (4, 1)
        assert rows[name].parameters == 4 * (update.shape[1] + update.shape[2])


def test_energy_is_kept_in_every_expert(base, tmp_path):
    directory = saved(adapted(base, rank_pattern={}, r=6), tmp_path / "a")
    report = truncate(directory, tmp_path / "b", energy=0.8, per_module=True)
    before, after = updates(directory), updates(str(tmp_path / "b"))
    for row in (row for row in report.modules if row.experts):
        kept = (after[row.module_name] ** 2).sum((1, 2)) / (before[row.module_name] ** 2).sum((1, 2))
        assert kept.min() >= 0.8 - 1e-6
        less = (best(before[row.module_name], row.kept_rank - 1) ** 2).sum((1, 2))
        assert (less / (before[row.module_name] ** 2).sum((1, 2))).min() < 0.8


def test_energy_in_total_and_budgets_count_all_experts(mixtral, tmp_path):
    directory = saved(adapted(mixtral, rank_pattern={}, r=4), tmp_path / "a")
    adapter = open_adapter(directory)
    spectra = [np.linalg.svd(u, compute_uv=False) ** 2 for u in updates(directory).values()]
    spectra += [
        adapter.factors(m).singular_values().double().numpy()[None] ** 2 for m in adapter.modules if not m.experts
    ]
    each = sum((s[:, :4].sum(0) for s in spectra), start=np.zeros(4))
    rank = int((each.cumsum() / each.sum() < 0.8).sum()) + 1
    assert truncate(directory, tmp_path / "b", energy=0.8, energy_of="total").r == rank
    of_a_rank = 2 * (4 * (16 + 24) + 4 * (48 + 16) + 32)
    report = truncate(directory, tmp_path / "c", budget=3 * of_a_rank - 1)
    assert (report.r, report.parameters) == (2, 2 * of_a_rank)
    assert truncate(directory, tmp_path / "d", budget=3 * of_a_rank, per_module=True).parameters <= 3 * of_a_rank


def test_merges_are_the_sums_of_each_expert_s_updates(base, tmp_path):
    one = saved(adapted(base), tmp_path / "a")
    other = saved(adapted(base, seed=3, r=2, rank_pattern={}, target_parameters=TARGETS[1:]), tmp_path / "b")
    report = merge([one, other], tmp_path / "c", weights=[1.0, 0.5])
    first, second, found = updates(one), updates(other), updates(str(tmp_path / "c"))
    assert found.keys() == first.keys()
    for name, update in found.items():
        np.testing.assert_allclose(update, first[name] + 0.5 * second.get(name, 0), atol=1e-5)
    assert {row.kept_rank for row in report.modules if row.module_name.endswith("down_proj")} == {4}
    assert sorted(json.loads((tmp_path / "c/adapter_config.json").read_text())["target_parameters"]) == sorted(found)
    for path, layer in wrappers(loaded(base, tmp_path / "c")).items():  # PEFT nests them as they were written
        assert path.endswith("base_layer") == (layer.parameter_name == "gate_up_proj")


def test_adapters_of_different_parameters_are_nested_together(mixtral, tmp_path):
    one = saved(adapted(mixtral, rank_pattern={}, target_parameters=TARGETS[:1]), tmp_path / "a")
    other = saved(adapted(mixtral, seed=3, rank_pattern={}, target_parameters=TARGETS[1:]), tmp_path / "b")
    merge([one, other], tmp_path / "c", weights=[1.0, 1.0])
    found, both = updates(str(tmp_path / "c")), updates(one) | updates(other)
    assert found.keys() == both.keys()
    for name in both:
        np.testing.assert_allclose(found[name], both[name], atol=1e-5)
    for path, layer in wrappers(loaded(mixtral, tmp_path / "c")).items():
        name = f"{path.removesuffix('.base_layer')}.{layer.parameter_name}"
        np.testing.assert_allclose(layer.get_delta_weight("default").detach(), both[name], atol=1e-5)


def test_ties_of_each_expert(base, tmp_path):
    directories = [saved(adapted(base, seed=seed), tmp_path / str(seed)) for seed in (2, 3)]
    merge(directories, tmp_path / "c", method="ties", density=0.5, rank=16)
    found = updates(str(tmp_path / "c"))
    first, second = map(updates, directories)
    combine = combiner("ties", 0.5)
    for name, update in found.items():
        for e in range(4):
            pair = [torch.tensor(u[name][e], dtype=torch.float32) for u in (first, second)]
            np.testing.assert_allclose(update[e], combine(pair, torch.tensor([0.5, 0.5])), atol=1e-5)


def test_ties_keep_the_energy_in_every_expert(mixtral, tmp_path):
    directories = [saved(adapted(mixtral, seed=seed), tmp_path / str(seed)) for seed in (2, 3)]
    report = merge(directories, tmp_path / "c", method="ties", density=0.5, energy=0.9, pad=False)
    assert 0.9 <= report.energy_kept < 1


def test_exports_of_models_and_directories_keep_the_logits(base, tmp_path):
    model = adapted(base, use_rslora=True)
    for number, source in enumerate((model, saved(model, tmp_path / "a"))):
        report = to_lora(source, tmp_path / f"out{number}")
        assert report.r == 3
        torch.testing.assert_close(logits(loaded(base, tmp_path / f"out{number}")), logits(model), atol=2e-6, rtol=1e-5)


def test_an_export_cut_to_a_rank(base, tmp_path):
    model = adapted(base)
    directory = saved(model, tmp_path / "a")
    report = to_lora(model, tmp_path / "b", rank=1)
    before, after = updates(directory), updates(str(tmp_path / "b"))
    for name, update in before.items():
        np.testing.assert_allclose(after[name], best(update, 1), atol=1e-5)
    rows = {row.module_name: row for row in report.modules}
    for name, update in before.items():
        expected = 1 - (best(update, 1) ** 2).sum() / (update**2).sum()
        assert rows[name].discarded_energy == pytest.approx(expected, rel=1e-4)


def test_masks_of_experts_become_ranks(base, tmp_path):
    config = SpecLoRAConfig(r=2, k=4, target_modules=["q_proj"], target_parameters=TARGETS)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = logits(model.eval())
    assert to_lora(model, tmp_path).r == 6
    plain = loaded(model.unload(), tmp_path)
    torch.testing.assert_close(logits(plain), expected, atol=2e-6, rtol=1e-5)


def test_inputs_of_experts_are_refused_by_name(mixtral, tmp_path):
    directory = saved(adapted(mixtral), tmp_path / "a")
    names = [module.name for module in open_adapter(directory).modules]
    message = r"`activations` must be those of one matrix each.* model\.layers\.0\.mlp\.experts\.down_proj, "
    with pytest.raises(UnsupportedModelError, match=message):
        truncate(directory, tmp_path / "b", energy=0.5, activations={name: torch.ones(2, 16) for name in names})
    assert not Path(tmp_path / "b").exists()


def test_half_precision_is_kept(mixtral, tmp_path):
    directory = saved(adapted(mixtral).to(torch.bfloat16), tmp_path / "a")
    report = truncate(directory, tmp_path / "b", max_rank=2)
    assert {module.dtype for module in open_adapter(tmp_path / "b").modules} == {torch.bfloat16}
    assert all(row.error is not None and row.error < 0.01 for row in report.modules)
