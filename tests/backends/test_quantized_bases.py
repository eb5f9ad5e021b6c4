"""Both tuners over every backend that runs on a CPU, against the formula with the backend's own dequantized weight."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorakit
from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.errors import UnsupportedModelError
from lorakit.tuners.speclora import SpecLoRALayer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
K = 40  # more than the 32 rows of the key and value projections
MODES = ("hadamard", "svd")


@pytest.fixture(autouse=True)
def _without_expected_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is clipped to the smaller side")
        warnings.filterwarnings("ignore", message=".*may get different generations due to rounding errors")
        yield


def spec(**options: object) -> SpecLoRAConfig:
    return SpecLoRAConfig(**{"r": 4, "lora_alpha": 6, "k": K, "target_modules": TARGETS} | options)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """By name, the names being those in the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def formula_weight(W: Tensor, layer: LoraLayer, adapter: str = "default") -> Tensor:
    """Γ ⊙ W + scaling · B A in float64; in the svd mode Eq. 4-6."""
    A, B = (factors[adapter].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
    low_rank = layer.scaling[adapter] * B @ A
    if not isinstance(layer, SpecLoRALayer):
        return W + low_rank
    mask = layer.lora_spec[adapter]
    d, k = 1 + mask.weight.detach().double(), mask.k
    if mask.mode == "hadamard":
        gamma = torch.ones_like(W)
        gamma[:k, :k] = d[:, None]
        return gamma * W + low_rank
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U[:k, :k] *= d[:, None]
    return U @ torch.diag(S) @ Vh + low_rank


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def logits(model: nn.Module, token_ids: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids, **options).logits


def tensors_and_flags(module: nn.Module) -> dict[str, object]:
    """Everything that a layer holds: its own attributes, and those of its weight's and of its state."""
    found: dict[str, object] = {}

    def walk(name: str, value: object, depth: int) -> None:
        if isinstance(value, Tensor):
            found[name] = (
                value.detach().dequantize() if type(value).__module__.startswith("torchao") else value.detach()
            )
            found[f"{name} type"] = (type(value), value.dtype, value.shape)
        elif isinstance(value, bool | int | float | str | torch.dtype | None):
            found[name] = value
        attributes = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        if depth and not isinstance(value, nn.Module):
            for key, inner in attributes.items():
                walk(f"{name}.{key}", inner, depth - 1)

    for key, value in vars(module).items():
        walk(key, value, 4)
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


@pytest.mark.parametrize("config", [spec(), spec(mode="svd"), FisherLoRAConfig(r=4, r_q=2)], ids=lambda c: c.peft_type)
def test_a_new_adapter_changes_nothing(backend, quantized, config, token_ids):
    base = quantized()
    before = logits(base, token_ids)
    model = get_peft_model(base, config)
    assert distance(logits(model.eval(), token_ids), before) <= backend.tolerance


@pytest.mark.parametrize("config", [spec(), spec(mode="svd"), FisherLoRAConfig(r=4, r_q=2)], ids=lambda c: c.peft_type)
def test_a_layer_s_output_and_gradients_are_those_of_the_formula(backend, quantized, adapted, dequantize, config):
    """Its low-rank and mask terms alone, and the whole with the base layer's own output."""
    reference, model = quantized(), adapted(config)
    for name, layer in lora_layers(model).items():
        W = dequantize(reference.get_submodule(name))
        x = torch.randn(2, 5, layer.in_features).to(backend.dtype).requires_grad_()
        y = layer(x)
        upstream = torch.randn_like(y)
        (y * upstream).sum().backward()
        difference = x.double() @ (formula_weight(W, layer) - W).T
        with torch.no_grad():
            base = layer.get_base_layer()(x.clone().requires_grad_())
        assert distance(y, base.double() + difference) < (1e-5 if backend.dtype == torch.float32 else 1e-2)
        bias = getattr(layer.get_base_layer(), "bias", None)
        whole = x.double() @ formula_weight(W, layer).T + (0 if bias is None else bias.double())
        assert distance(y, whole) < backend.tolerance
        assert distance(x.grad, upstream.double() @ formula_weight(W, layer)) < backend.tolerance
        if isinstance(layer, SpecLoRALayer):
            mask = layer.lora_spec["default"]
            if mask.mode == "hadamard":
                projected = x[..., : mask.k].double() @ W[: mask.k, : mask.k].T
                expected = (projected * upstream[..., : mask.k].double()).sum((0, 1))
                assert distance(mask.weight.grad, expected) < (1e-4 if backend.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("mode", [*MODES, "hadamard_bottom"])
def test_of_a_weight_the_block_alone_is_dequantized_and_nothing_else_changes(backend, quantized, dequantize, mode):
    base = quantized()
    modules = {name: module for name, module in base.named_modules() if name.rpartition(".")[2] in TARGETS}
    weights = {name: dequantize(module) for name, module in modules.items()}
    for module in modules.values():  # some settle at their first input
        module(torch.zeros(1, module.in_features, dtype=base.dtype).requires_grad_())
    before = {name: tensors_and_flags(module) for name, module in modules.items()}
    assert all(any(isinstance(value, Tensor) for value in flags.values()) for flags in before.values())

    asked = []
    for module in modules.values():
        module.register_forward_pre_hook(lambda module, args: asked.append((args[0].shape[0], module.in_features)))
    model = get_peft_model(base, spec(mode=mode))
    assert len(asked) == len(modules)
    assert all(count == (d_in if mode == "svd" else min(K, count)) for count, d_in in asked)
    for module in modules.values():
        module._forward_pre_hooks.clear()

    for name, layer in lora_layers(model).items():
        W, mask = weights[name], layer.lora_spec["default"]
        k = min(K, *W.shape)
        assert layer.get_base_layer() is modules[name]
        assert list(mask.state_dict()) == [f"weight_{mode}"]
        assert [key for key, _ in mask.named_buffers()] == ["block"]
        assert mask.block.shape == (k, k if mode != "svd" else W.shape[1])
        assert mask.block.untyped_storage().nbytes() == mask.block.numel() * mask.block.element_size()
        if mode == "svd":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            expected = (U[:k, :k] * S[:k]) @ Vh[:k]
        else:
            expected = W[:k, :k] if mode == "hadamard" else W[-k:, -k:]
        rounding = 2**-15 if backend.dtype == torch.float32 else torch.finfo(backend.dtype).eps
        assert (mask.block.double() - expected).abs().max() <= rounding * W.abs().max()

        after = tensors_and_flags(modules[name])
        assert after.keys() == before[name].keys()
        for key, value in before[name].items():
            same = torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value
            assert same, f"{name}: {key}"


@pytest.mark.parametrize("config", [spec(), spec(mode="svd"), FisherLoRAConfig(r=4, r_q=2)], ids=lambda c: c.peft_type)
def test_two_training_steps(quantized, dequantize, token_ids, config):
    base = quantized()
    model = get_peft_model(prepare_model_for_kbit_training(base), config).train()
    weights = {name: dequantize(layer.get_base_layer()) for name, layer in lora_layers(model).items()}
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_spec" in name for name in trained) == isinstance(config, SpecLoRAConfig)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=token_ids, labels=token_ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    named = dict(model.named_parameters())
    assert all(not torch.equal(named[name], value) for name, value in trained.items())
    for name, layer in lora_layers(model).items():
        assert torch.equal(dequantize(layer.get_base_layer()), weights[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("config", [spec(), spec(mode="svd"), FisherLoRAConfig(r=4, r_q=2)], ids=lambda c: c.peft_type)
def test_saving_and_loading(backend, quantized, adapted, token_ids, tmp_path, config, low_cpu_mem_usage):
    model = adapted(config)
    expected = logits(model, token_ids)
    assert distance(expected, logits(quantized(), token_ids)) > 2 * backend.tolerance
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    if low_cpu_mem_usage and backend.dtype == torch.bfloat16:  # to which PEFT rounds LoRA's factors then
        assert distance(logits(loaded, token_ids), expected) < 2e-2
    else:
        assert distance(logits(loaded, token_ids), expected) <= backend.tolerance


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_merging_and_unmerging_err_by_the_requantization_that_lora_s_do(adapted, dequantize, mode, safe_merge):
    def errors(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        layers = lora_layers(model)
        originals = {name: dequantize(layer.get_base_layer()) for name, layer in layers.items()}
        targets = {name: formula_weight(originals[name], layer) for name, layer in layers.items()}
        model.merge_adapter(safe_merge=safe_merge)
        merged = {name: distance(dequantize(layer.get_base_layer()), targets[name]) for name, layer in layers.items()}
        model.unmerge_adapter()
        back = {name: distance(dequantize(layer.get_base_layer()), originals[name]) for name, layer in layers.items()}
        return merged, back

    plain, masked = adapted(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)), adapted(spec(mode=mode))
    masked.load_state_dict({k: v for k, v in plain.state_dict().items() if ".lora_" in k}, strict=False)
    for layer in lora_layers(masked).values():
        layer.lora_spec["default"].weight.data.mul_(4)
        layer.lora_spec["default"].weight.data[0] = -1  # d = 0: nothing is left of a row to divide
    for own, lora in zip(errors(masked), errors(plain), strict=True):
        for name, error in own.items():
            assert error <= 1.5 * lora[name] + 1e-6
            assert error < 0.25


def test_merge_and_unload_leaves_a_base_model_with_the_formula_s_weights(quantized, adapted, dequantize):
    model = adapted(spec())
    targets = {
        name: formula_weight(dequantize(layer.get_base_layer()), layer) for name, layer in lora_layers(model).items()
    }
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    for name, target in targets.items():
        assert type(merged.get_submodule(name)) is type(quantized().get_submodule(name))
        assert distance(dequantize(merged.get_submodule(name)), target) < 0.15


def test_disabling_and_mixed_batches(backend, quantized, adapted, randomize, token_ids):
    model = adapted(spec())
    model.add_adapter("other", spec(k=5, r=2, mode="svd"))
    model.set_adapter("other")
    randomize(model, seed=9)
    alone = {"other": logits(model, token_ids)}
    model.set_adapter("default")
    alone["default"] = logits(model, token_ids)
    with model.disable_adapter():
        alone["__base__"] = logits(model, token_ids)
    assert distance(alone["__base__"], logits(quantized(), token_ids)) <= backend.tolerance
    assert distance(alone["other"], alone["default"]) > 0.1
    for names in (["default", "other"], ["other", "__base__"], ["default", "default"]):
        mixed = logits(model, token_ids, adapter_names=names)
        for i, name in enumerate(names):
            assert distance(mixed[i], alone[name][i]) < (2e-2 if model.dtype == torch.bfloat16 else 1e-5)


def test_dora(backend, quantized, adapted, dequantize):
    """W' = m V / ‖V‖ by rows, V being Γ ⊙ W + scaling · B A and m what the rows of W measure."""
    reference = quantized()
    model = adapted(spec(use_dora=True))
    for name, layer in lora_layers(model).items():
        W, m = dequantize(reference.get_submodule(name)), layer.lora_magnitude_vector["default"].weight
        V = formula_weight(W, layer)
        expected_weight = (m.detach().double() / V.norm(dim=1))[:, None] * V
        x = torch.randn(2, 5, layer.in_features).to(backend.dtype).requires_grad_()
        bias = getattr(layer.get_base_layer(), "bias", None)
        y = layer(x)
        assert distance(y, x.double() @ expected_weight.T + (0 if bias is None else bias.double())) < backend.tolerance
        y.sum().backward()
        assert layer.lora_spec["default"].weight.grad.abs().min() > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_where_lora_s_can_be_made(backend, adapted, token_ids, copied):
    try:
        copied(adapted(LoraConfig(r=2, target_modules=TARGETS)))
    except Exception as error:
        with pytest.raises(type(error)):
            copied(adapted(spec()))
        return
    model = adapted(spec())
    assert distance(logits(copied(model), token_ids), logits(model, token_ids)) <= backend.tolerance


def test_k_patterns_and_clipping(quantized):
    with pytest.warns(UserWarning, match=r"SpecLoRA: `k` is clipped .* in 5 of 10 modules.*\(40 to 32\)"):
        model = get_peft_model(quantized(), spec(k_pattern={"q_proj": 3, r"1\.mlp\.down_proj": 100}))
    sizes = {name: layer.lora_spec["default"].k for name, layer in lora_layers(model).items()}
    assert {k for name, k in sizes.items() if "q_proj" in name} == {3}
    assert {k for name, k in sizes.items() if "k_proj" in name or "v_proj" in name} == {32}
    assert {k for name, k in sizes.items() if "o_proj" in name} == {K}
    assert {name: k for name, k in sizes.items() if "down_proj" in name} == {
        "model.layers.0.mlp.down_proj": K,
        "model.layers.1.mlp.down_proj": 64,
    }


def test_ranks_by_role(quantized):
    model = get_peft_model(quantized(), FisherLoRAConfig(r=6, r_q=2, r_v=5, target_modules=TARGETS))
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert ranks == {"q_proj": 2, "v_proj": 5, "k_proj": 6, "o_proj": 6, "down_proj": 6}
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}


def test_an_export_is_a_plain_lora_with_the_same_outputs(backend, quantized, adapted, token_ids, tmp_path):
    model = adapted(spec(k=6))
    report = lorakit.export.to_lora(model, tmp_path)
    assert report.r == 4 + 6
    plain = PeftModel.from_pretrained(quantized(), tmp_path)
    assert plain.peft_config["default"].peft_type == "LORA"
    assert distance(logits(plain, token_ids), logits(model, token_ids)) < (
        1e-4 if backend.dtype == torch.float32 else 3e-2
    )


def test_effective_ranks_of_quantized_weights_are_those_of_what_they_dequantize_to(
    backend, quantized, adapted, dequantize, token_ids, files, tmp_path
):
    model = adapted(LoraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    before = logits(model, token_ids)
    with pytest.raises(UnsupportedModelError, match="adapted weights are quantized.*`dequantize=True`"):
        lorakit.lens.rank_correlation(model)
    for adapter, base in ((model, None), (tmp_path, quantized())):
        report = lorakit.lens.rank_correlation(adapter, base, dequantize=True)
        assert report.dequantized
        assert report.findings == ()
        layers = lora_layers(model)
        assert {row.module_name for row in report.modules} == set(layers)
        for row in report.modules:
            sigma = torch.linalg.svdvals(dequantize(layers[row.module_name].get_base_layer()))
            expected = torch.distributions.Categorical(sigma / sigma.sum()).entropy().exp()
            assert row.pretrained_effective_rank == pytest.approx(float(expected), rel=1e-4)
    assert distance(logits(model, token_ids), before) <= backend.tolerance
    assert not lorakit.lens.rank_correlation(model, files).dequantized
