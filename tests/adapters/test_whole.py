"""Whole updates of DoRA and SPECLORA, against numpy in float64 and against PEFT's merged weights."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from torch import nn
from typer.testing import CliRunner

from lorakit import SpecLoRAConfig, lens
from lorakit.adapters import open_adapter
from lorakit.adapters.whole import with_whole_updates
from lorakit.cli.app import app
from lorakit.compress import truncate
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.export import to_lora
from lorakit.merging import merge

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "dora": lambda **more: LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=TARGETS, **more),
    "dora, rslora": lambda: LoraConfig(r=3, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=TARGETS),
    "speclora": lambda **more: SpecLoRAConfig(r=3, k=5, target_modules=TARGETS, **more),
    "speclora, bottom": lambda: SpecLoRAConfig(r=3, k=5, mode="hadamard_bottom", target_modules=TARGETS),
    "speclora, svd": lambda: SpecLoRAConfig(r=3, k=5, mode="svd", target_modules=TARGETS),
    "speclora, svd_bottom": lambda: SpecLoRAConfig(r=3, k=5, mode="svd_bottom", target_modules=TARGETS),
    "speclora, dora": lambda: SpecLoRAConfig(r=3, k=5, use_dora=True, target_modules=TARGETS),
    "speclora, large k": lambda: SpecLoRAConfig(r=3, k=32, target_modules=TARGETS),
}


@pytest.fixture(params=list(CONFIGS))
def trained(request, tiny_llama, randomize, tmp_path):
    """A saved adapter, its base model on disk, and the model with it."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = shaken(get_peft_model(base, CONFIGS[request.param]()))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), str(tmp_path / "base"), model


def shaken(model):
    """Random factors, and magnitudes and masks near their start, as training leaves them."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()


def merged_updates(model):
    """PEFT's merged weights minus the base's, by module name, oriented (d_out, d_in)."""
    before = {name: module.get_base_layer().weight.detach().double() for name, module in layers(model).items()}
    merged = copy.deepcopy(model).merge_and_unload()
    after = {name: merged.get_submodule(name).weight.detach().double() for name in before}
    return {name: (after[name] - before[name]).numpy() for name in before}


def layers(model):
    found = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    return {name: module for name, module in found.items() if module.lora_A or module.lora_embedding_A}


def test_whole_updates_are_peft_s_merged_weights_minus_the_base(trained):
    directory, base, model = trained
    expected = merged_updates(model)
    for adapter, weights in ((directory, base), (model, model), (directory, model)):
        whole = with_whole_updates(open_adapter(adapter), weights)
        assert {module.name for module in whole.modules} == expected.keys()
        for module in whole.modules:
            found = whole.factors(module).dense().numpy()
            size = np.linalg.norm(expected[module.name])
            assert np.linalg.norm(found - expected[module.name]) < 3e-6 * size + 1e-6
            assert module.whole_of is not None
            assert module.parameters == module.whole_of.parameters
    (finding,) = [finding for finding in whole.findings if finding.code == "whole_update"]
    assert f"In {len(expected)} modules the update is the whole one" in finding.message


def test_dora_by_its_formula(tiny_llama, tmp_path):
    base = tiny_llama()
    model = shaken(get_peft_model(copy.deepcopy(base), CONFIGS["dora"]()))
    model.save_pretrained(tmp_path)
    tensors = {
        key: value.astype(np.float64) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    whole = with_whole_updates(open_adapter(tmp_path), base)
    for module in whole.modules:
        W = base.get_submodule(module.name).weight.detach().double().numpy()
        start = f"base_model.model.{module.name}.lora_"
        V = W + 2 * tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
        m = tensors[f"{start}magnitude_vector"]
        expected = (m / np.linalg.norm(V, axis=1))[:, None] * V - W
        np.testing.assert_allclose(whole.factors(module).dense(), expected, atol=1e-6)
        np.testing.assert_allclose(
            whole.factors(module).singular_values(),
            np.linalg.svd(expected, compute_uv=False),
            atol=1e-6 * np.linalg.norm(expected, 2),
        )


def test_speclora_s_update_has_rank_r_plus_k(tiny_llama, tmp_path):
    model = shaken(get_peft_model(tiny_llama(), CONFIGS["speclora"]()))
    model.save_pretrained(tmp_path)
    whole = with_whole_updates(open_adapter(tmp_path), tiny_llama())
    assert {module.rank for module in whole.modules} == {8}


@pytest.mark.parametrize("config", [{"use_dora": True}, {}])
def test_other_layers(config, tmp_path):
    """GPT-2's transposed weights, embeddings and convolutions."""
    base = nn.ModuleDict({"embed": nn.Embedding(12, 6), "conv": nn.Conv2d(4, 8, 3), "conv1": nn.Conv1d(4, 6, 2)})
    targets = ["embed", "conv", "conv1"]
    kind = (
        LoraConfig(r=2, target_modules=targets, **config)
        if config
        else SpecLoRAConfig(r=2, k=3, target_modules=targets)
    )
    model = shaken(get_peft_model(base, kind))
    model.save_pretrained(tmp_path)
    expected = merged_updates(model)
    for source in (str(tmp_path), model):
        whole = with_whole_updates(open_adapter(source), model)
        for module in whole.modules:
            found = module.in_base_layout(whole.factors(module).dense()).numpy()
            np.testing.assert_allclose(found.reshape(expected[module.name].shape), expected[module.name], atol=2e-6)


def test_transposed_weights(tiny_gpt2, tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn", "attn.c_proj"], use_dora=True, fan_in_fan_out=True)
    model = shaken(get_peft_model(tiny_gpt2(), config))
    model.save_pretrained(tmp_path)
    whole = with_whole_updates(open_adapter(tmp_path), tiny_gpt2())
    for name, expected in merged_updates(model).items():
        module = next(module for module in whole.modules if module.name == name)
        np.testing.assert_allclose(whole.factors(module).dense().mT, expected, atol=2e-6)


def test_the_audit_measures_whole_updates(trained):
    directory, base, model = trained
    expected = merged_updates(model)
    report = lens.audit(directory, base=base)
    assert not any(row.low_rank_part_only for row in report.modules)
    assert all(row.whole_update for row in report.modules)
    assert report.peft_type == open_adapter(directory).settings.peft_type
    for row in report.modules:
        sigma = np.linalg.svd(expected[row.module_name], compute_uv=False)
        np.testing.assert_allclose(row.singular_values, sigma[: row.rank], atol=3e-6 * sigma[0])
        assert row.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-4)
        assert row.beside
    before = lens.audit(directory)
    assert all(row.low_rank_part_only and not row.whole_update for row in before.modules)
    assert report.total.parameters == before.total.parameters
    assert report.parameters_beside == before.parameters_beside
    assert any(f" --base {base}" in step for step in report.next_steps)


def test_comparison_of_whole_updates(trained, tiny_llama, tmp_path):
    directory, base, model = trained
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))
    shaken(plain).save_pretrained(tmp_path / "plain")
    mine, yours = merged_updates(model), merged_updates(plain)
    report = lens.compare(directory, tmp_path / "plain", base=base)
    for row in report.modules:
        a, b = mine[row.module_name], yours[row.module_name]
        assert row.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
        assert row.frobenius_norm_a == pytest.approx(np.linalg.norm(a), rel=1e-5)
        assert row.whole_update
        assert not row.low_rank_part_only
    assert not any(finding.code == "low_rank_part_only" for finding in report.findings)


def best(update, rank):
    U, S, Vh = np.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("live", [False, True])
def test_the_cut_is_the_best_of_the_whole_update(trained, tmp_path, live):
    directory, base, model = trained
    expected = merged_updates(model)
    source, weights = (model, model) if live else (directory, base)
    report = truncate(source, tmp_path / "cut", max_rank=4, base=weights)
    written = open_adapter(tmp_path / "cut")
    assert (written.settings.peft_type, written.settings.use_dora) == ("LORA", False)
    assert {row.rank for row in report.modules} == {3}
    for module in written.modules:
        update = expected[module.name]
        optimum = best(update, 4)
        found = written.factors(module).dense().numpy()
        np.testing.assert_allclose(found, optimum, atol=2e-5 * np.linalg.norm(update))
        row = next(row for row in report.modules if row.module_name == module.name)
        assert row.whole_update
        assert not row.low_rank_part_only
        assert row.energy_kept == pytest.approx((optimum**2).sum() / (update**2).sum(), rel=1e-4)
    assert any(finding.code == "whole_update" for finding in report.findings)


def test_a_whole_update_that_is_not_cut_gives_the_same_logits(trained, tiny_llama, tmp_path):
    directory, base, model = trained
    ids = torch.arange(16).reshape(2, 8)
    truncate(directory, tmp_path / "plain", energy=1.0, base=base)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)
        assert (plain(ids).logits - tiny_llama()(ids).logits).abs().max() > 0.01


def test_speclora_cut_from_a_file_is_that_of_its_model(tiny_llama, tmp_path):
    model = shaken(get_peft_model(tiny_llama(), CONFIGS["speclora"]()))
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model, tmp_path / "exported", rank=4)
    truncate(tmp_path / "adapter", tmp_path / "cut", max_rank=4, base=tiny_llama())
    one, other = open_adapter(tmp_path / "exported"), open_adapter(tmp_path / "cut")
    for a, b in zip(one.modules, other.modules, strict=True):
        torch.testing.assert_close(one.factors(a).dense(), other.factors(b).dense(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_merges_are_of_whole_updates(trained, tiny_llama, tmp_path, method):
    directory, base, model = trained
    plain = shaken(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS)))
    plain.save_pretrained(tmp_path / "plain")
    mine, yours = merged_updates(model), merged_updates(plain)
    options = {"density": 1.0} if method == "ties" else {}
    rank = None if method == "linear" else 32
    sources = [directory, tmp_path / "plain"]
    merge(sources, tmp_path / "merged", weights=[0.5, 2.0], method=method, rank=rank, base=base, **options)
    written = open_adapter(tmp_path / "merged")
    assert written.settings.peft_type == "LORA"
    for module in written.modules:
        a, b = 0.5 * mine[module.name], 2.0 * yours[module.name]
        if method == "ties":  # entry by entry, the sign with the larger total
            sign = np.sign(mine[module.name] + yours[module.name])
            agree = [(np.sign(x) == sign) & (sign != 0) for x in (a, b)]
            count = np.maximum(agree[0].astype(int) + agree[1], 1)
            expected = (np.where(agree[0], a, 0) + np.where(agree[1], b, 0)) / count
        else:
            expected = a + b
        found = written.factors(module).dense().numpy()
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_without_a_base_they_are_as_before(tiny_llama, tmp_path):
    dora, spec = (str(tmp_path / name) for name in ("dora", "spec"))
    shaken(get_peft_model(tiny_llama(), CONFIGS["dora"]())).save_pretrained(dora)
    shaken(get_peft_model(tiny_llama(), CONFIGS["speclora"]())).save_pretrained(spec)
    with pytest.raises(UnsupportedModelError, match=r"SPECLORA adapter.*Give the base weights \(`base`, --base\)"):
        truncate(spec, tmp_path / "out", max_rank=1)
    with pytest.raises(UnsupportedModelError, match="a DoRA magnitude, .*Give the base weights as `base`"):
        merge([dora], tmp_path / "out")
    report = truncate(dora, tmp_path / "out", max_rank=1)
    assert {row.low_rank_part_only for row in report.modules} == {True}
    assert any("lora_magnitude_vector" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))


def test_bases_that_do_not_fit_are_named(tiny_llama, tmp_path):
    shaken(get_peft_model(tiny_llama(), CONFIGS["dora"]())).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="'Sequential' lacks 6 weights that .* adapts: model.layers.0"):
        lens.audit(tmp_path / "a", base=nn.Sequential(nn.Linear(2, 2)))
    message = r"the update is 32 × 48, but the weight in 'LlamaForCausalLM' has the shape \(32, 80\)"
    with pytest.raises(AdapterFileError, match=message):
        truncate(tmp_path / "a", tmp_path / "b", max_rank=1, base=tiny_llama(intermediate_size=80))
    assert not (tmp_path / "b").exists()


def test_plain_adapters_need_no_base(tiny_llama, tmp_path):
    shaken(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))).save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    assert with_whole_updates(adapter, tmp_path / "nowhere") is adapter


def test_grouped_convolutions_are_refused_by_name(tmp_path):
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, groups=2)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["conv"], use_dora=True))
    with pytest.raises(UnsupportedModelError, match="whole updates of grouped convolutions are not covered: conv"):
        with_whole_updates(open_adapter(model), model)


def test_half_precision_and_lora_bias(tiny_llama, tmp_path):
    config = SpecLoRAConfig(r=3, k=5, lora_bias=True, lora_alpha=9, target_modules=TARGETS)
    model = shaken(get_peft_model(tiny_llama(), config))
    model.save_pretrained(tmp_path / "a")
    truncate(tmp_path / "a", tmp_path / "b", energy=1.0, base=tiny_llama())
    ids = torch.arange(16).reshape(2, 8)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    truncate(tmp_path / "half", tmp_path / "c", max_rank=2, base=tiny_llama())
    assert {module.dtype for module in open_adapter(tmp_path / "c").modules} == {torch.bfloat16}


def test_the_mask_follows_the_scaling(tiny_llama):
    model = shaken(get_peft_model(tiny_llama(), CONFIGS["speclora"]()))
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    whole = with_whole_updates(open_adapter(model), model)
    for name, expected in merged_updates(model).items():
        module = next(module for module in whole.modules if module.name == name)
        np.testing.assert_allclose(whole.factors(module).dense(), expected, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**16))
def test_dora_of_any_shape(d_out, d_in, r, seed):
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(d_in, d_out)),
        LoraConfig(r=r, target_modules=["0"], use_dora=True, init_lora_weights=False),
    )
    whole = with_whole_updates(open_adapter(model), model)
    (expected,) = merged_updates(model).values()
    np.testing.assert_allclose(whole.factors(whole.modules[0]).dense(), expected, atol=1e-5)


def test_the_shell_takes_a_base(trained, tmp_path):
    directory, base, _ = trained
    runner = CliRunner()
    for command in (["audit", directory], ["compare", directory, directory]):
        result = runner.invoke(app, [*command, "--base", base, "--json"])
        assert result.exit_code == 0, result.output
        assert all(row["whole_update"] for row in json.loads(result.stdout)["modules"])
    for command in (
        ["compress", directory, str(tmp_path / "cut"), "--max-rank", "2"],
        ["merge", directory, directory, str(tmp_path / "merged"), "--rank", "2"],
    ):
        result = runner.invoke(app, [*command, "--base", base])
        assert result.exit_code == 0, result.output
    cut, merged = open_adapter(tmp_path / "cut"), open_adapter(tmp_path / "merged")
    for a, b in zip(cut.modules, merged.modules, strict=True):
        torch.testing.assert_close(cut.factors(a).dense(), merged.factors(b).dense(), atol=1e-5, rtol=1e-4)
