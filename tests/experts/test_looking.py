"""Audit, comparison and servers' checks of adapters of experts, against numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from typer.testing import CliRunner

from lorakit import lens, serving
from lorakit.adapters import open_adapter
from lorakit.cli.app import app
from lorakit.compress import truncate
from lorakit.errors import UnsupportedModelError

from .conftest import adapted, dense, saved

pytestmark = pytest.mark.slow


class RoutedExperts(nn.Module):
    """Experts as modules, as Mixtral had them before transformers 5: each sees the tokens that are routed to it."""

    def __init__(self, d: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(d, 12, bias=False), "w2": nn.Linear(12, d, bias=False)})
            for _ in range(experts)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            hidden = expert["w2"](expert["w1"](flat[token]).tanh())  # runs for no tokens, too
            out = out.index_add(0, token, hidden * weight[token, place, None])
        return out.reshape(x.shape)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"block_sparse_moe": RoutedExperts()}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["block_sparse_moe"](x)
        return x


def routed() -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(Routed(), LoraConfig(r=2, target_modules=["w1", "w2"], init_lora_weights=False))
    return model.eval()


def numbers(update: np.ndarray, rank: int) -> dict[str, float]:
    sigma = np.linalg.svd(update, compute_uv=False)[:rank]
    p = sigma / sigma.sum()
    return {
        "frobenius_norm": float(np.sqrt((sigma**2).sum())),
        "spectral_norm": float(sigma[0]),
        "stable_rank": float((sigma**2).sum() / sigma[0] ** 2),
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
    }


@pytest.fixture
def stacks(base, tmp_path):
    """A saved adapter, and each of its stacks' ΔW (experts, d_out, d_in) with its rank."""
    directory = saved(adapted(base), tmp_path / "a")
    modules = [module for module in open_adapter(directory).modules if module.experts]
    return directory, {m.name: (dense(directory, m.path, 4, m.scaling), m.rank) for m in modules}


def test_every_expert_has_its_spectrum(stacks):
    directory, updates = stacks
    rows = {row.module_name: row for row in lens.audit(directory, by="expert").modules}
    assert len(rows) == 2 + 4 * len(updates)
    for name, (update, rank) in updates.items():
        owner, _, leaf = name.rpartition(".")
        for e in range(4):
            row = rows[f"{owner}.{e}.{leaf}"]
            for key, value in numbers(update[e], rank).items():
                assert getattr(row, key) == pytest.approx(value, rel=1e-5), key
            assert (row.stack, row.rank, row.experts) == (name, rank, None)
            assert row.parameters == rank * (row.d_out + row.d_in)


def test_a_group_has_the_block_s_norms_and_quantiles_over_experts(stacks):
    directory, updates = stacks
    report = lens.audit(directory)
    rows = {row.module_name: row for row in report.modules}
    assert len(rows) == 2 + len(updates)
    for name, (update, rank) in updates.items():
        row, each = rows[name], [numbers(one, rank) for one in update]
        sigma = np.linalg.svd(update, compute_uv=False)[:, :rank]
        assert row.frobenius_norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
        assert row.spectral_norm == pytest.approx(sigma.max(), rel=1e-5)
        np.testing.assert_allclose(row.singular_values, np.sqrt((sigma**2).sum(0)), rtol=1e-5)
        needed = ((sigma**2).cumsum(1) / (sigma**2).sum(1)[:, None] < 0.9).sum(1) + 1
        assert row.energy_rank["0.9"] == needed.max()
        for key in ("stable_rank", "effective_rank"):
            values = [one[key] for one in each]
            assert getattr(row, key) == pytest.approx(np.median(values), rel=1e-5)
            found = row.experts.quantiles[key]
            assert found == pytest.approx(
                dict(zip(found, np.quantile(values, [0, 0.1, 0.5, 0.9, 1]), strict=True)), rel=1e-5
            )
        assert (row.experts.count, row.experts.zero) == (4, 0)
    json.dumps(report.to_dict(), allow_nan=False)
    assert [table.title for table in report.tables()].count("Experts") == 1
    assert report.plot().axes


def test_suggested_ranks_of_stacks_are_what_compress_keeps(stacks, tmp_path):
    directory, _ = stacks
    report = lens.audit(directory, energy=0.8, suggest_ranks=True, budget="2k")
    by_policy = {suggestion.policy: suggestion for suggestion in report.suggestions}
    written = truncate(directory, tmp_path / "b", energy=0.8, per_module=True)
    assert by_policy["per_module"].ranks == {row.module_name: row.kept_rank for row in written.modules}
    assert by_policy["per_module"].energy_kept == pytest.approx(written.energy_kept, rel=1e-5)
    assert by_policy["per_module"].parameters == written.parameters
    within = truncate(directory, tmp_path / "c", budget="2k", per_module=True)
    assert by_policy["budget"].ranks == {row.module_name: row.kept_rank for row in within.modules}


def test_experts_that_got_no_tokens_are_one_finding(mixtral):
    model = adapted(mixtral)
    B = model.base_model.model.model.layers[0].mlp.experts.lora_B["default"].weight  # of down_proj, rank 2
    with torch.no_grad():
        B[:, 0::4] = 0
        B[:, 2::4] = 0
    report = lens.audit(model)
    (finding,) = [finding for finding in report.findings if finding.code == "untrained"]
    name = "model.layers.0.mlp.experts.down_proj"
    assert finding.module_name == name
    assert finding.message.startswith(f"{name}: in 2 experts, B is all zeros, as before training: ")
    row = next(row for row in report.modules if row.module_name == name)
    assert row.experts.zero == 2
    with torch.no_grad():
        B[:, 1] = float("nan")
    broken = lens.audit(model)
    assert broken.has_errors
    assert next(row for row in broken.modules if row.module_name == name).frobenius_norm is None


def test_experts_as_modules_have_a_row_for_each_group():
    model = routed()
    report, each = lens.audit(model), lens.audit(model, by="expert")
    assert len(each.modules) == 12
    assert [row.module_name for row in report.modules] == [
        f"layers.{i}.block_sparse_moe.experts.*.{leaf}" for i in range(2) for leaf in ("w1", "w2")
    ]
    members = [row for row in each.modules if row.module_name.startswith("layers.0") and row.role == "gate"]
    assert report.modules[0].frobenius_norm == pytest.approx(np.hypot.reduce([m.frobenius_norm for m in members]))
    assert report.modules[0].stable_rank == pytest.approx(np.median([m.stable_rank for m in members]))
    assert report.modules[0].parameters == sum(m.parameters for m in members)
    wanted = lens.audit(model, suggest_ranks=True).suggestions[0].ranks
    assert set(wanted) == {row.module_name for row in each.modules}  # each may have a rank of its own


def test_comparison_of_each_expert_and_of_groups(base, tmp_path):
    one, other = (saved(adapted(base, seed=seed), tmp_path / str(seed)) for seed in (2, 3))
    modules = [module for module in open_adapter(one).modules if module.experts]
    each = {row.module_name: row for row in lens.compare(one, other, by="expert").modules}
    grouped = {row.module_name: row for row in lens.compare(one, other).modules}
    assert (len(each), len(grouped)) == (2 + 4 * len(modules), 2 + len(modules))
    for module in modules:
        a, b = (dense(directory, module.path, 4, module.scaling) for directory in (one, other))
        owner, _, leaf = module.name.rpartition(".")
        for e in range(4):
            cosine = (a[e] * b[e]).sum() / np.linalg.norm(a[e]) / np.linalg.norm(b[e])
            assert each[f"{owner}.{e}.{leaf}"].cosine == pytest.approx(cosine, abs=1e-6)
        row = grouped[module.name]
        assert row.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
        assert row.frobenius_norm_a == pytest.approx(np.linalg.norm(a), rel=1e-5)
        counts = row.experts.verdicts
        assert sum(counts.values()) == row.experts.count == 4
        assert counts[row.verdict] == max(counts.values())
    same = lens.compare(one, one)
    assert {row.verdict for row in same.modules} == {"redundant"}
    json.dumps(same.to_dict(), allow_nan=False)
    assert same.plot().axes


def test_different_numbers_of_experts_are_a_finding(mixtral, tmp_path):
    from transformers import MixtralForCausalLM

    config = type(mixtral.config)(**{**mixtral.config.to_dict(), "num_local_experts": 2})
    one = saved(adapted(mixtral), tmp_path / "a")
    other = saved(adapted(MixtralForCausalLM(config)), tmp_path / "b")
    report = lens.compare(one, other)
    assert {finding.module_name for finding in report.findings if finding.code == "shape_mismatch"} == {
        module.name for module in open_adapter(one).modules if module.experts
    }


def test_an_unknown_by_is_refused(mixtral):
    for function in (lambda: lens.audit(adapted(mixtral), by="row"), lambda: lens.compare("a", "b", by="row")):
        with pytest.raises(ValueError, match="`by` must be 'group' or 'expert'; got 'row'"):
            function()


def test_the_shell_has_a_row_for_each_expert_on_request(stacks):
    directory, updates = stacks
    for command in (["audit", directory], ["compare", directory, directory]):
        for options, rows in (([], 2 + len(updates)), (["--by", "expert"], 2 + 4 * len(updates))):
            result = CliRunner().invoke(app, [*command, *options, "--json"])
            assert result.exit_code == 0, result.output
            assert len(json.loads(result.stdout)["modules"]) == rows


def test_measures_of_single_matrices_leave_stacks_out_by_name(stacks):
    directory, updates = stacks
    for report in (lens.alignment(directory), lens.conditions(directory)):
        (finding,) = [finding for finding in report.findings if finding.code == "experts_left_out"]
        assert f"{len(updates)} stacks of experts are not measured here" in finding.message
    assert len(lens.energy_curves(directory).modules) == 2 + 4 * len(updates)


def test_servers_that_do_not_read_stacked_experts_are_named(stacks, tmp_path):
    directory, _ = stacks
    verdicts = {check.server: check for check in serving.check_all(directory)}
    assert verdicts["peft"].verdict == "right"
    for server in ("vllm", "sglang", "llama.cpp", "lorax", "tensorrt-llm", "peft-0.14"):
        assert "it has experts stacked in parameters (`target_parameters`)" in verdicts[server].refused
        assert verdicts[server].next_steps == ()
    assert "`is_3d_moe_weight`" in " ".join(verdicts["vllm"].notes)
    with pytest.raises(UnsupportedModelError, match="vllm does not serve adapters with stacked experts"):
        truncate(directory, tmp_path / "b", max_rank=1, for_server="vllm")
    assert not Path(tmp_path / "b").exists()
    plain = saved(get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=8, target_modules=["0"])), tmp_path / "p")
    assert serving.check(plain, "vllm").notes == ()
