"""SpecLoRA on every kind of layer, against the formula written out for that layer in float64, Γ formed in full."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import SpecLoRAConfig
from lorakit.tuners.speclora import MODES, SpecLoRALayer

K = 3


class Experts(nn.Module):
    """Two bare parameters, of which one stacks experts; `is_transposed` says (experts, d_in, d_out) to PEFT."""

    def __init__(self, is_transposed: bool, number: int = 2) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(number, 6, 9) if is_transposed else torch.randn(number, 9, 6))
        self.down = nn.Parameter(torch.randn(5, 9))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up if self.is_transposed else self.up.mT
        return torch.einsum("nti,eio->neto", x, up).sum(1) @ self.down.T


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the rows are multiplied by a number."""

    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


LAYERS = {
    "Linear": lambda: nn.Linear(8, 6),
    "Embedding": lambda: nn.Embedding(11, 6),
    "ScaledEmbedding": lambda: ScaledEmbedding(11, 6),
    "Conv1d": lambda: nn.Conv1d(5, 6, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(5, 6, (3, 2), stride=2, padding=1),
    "Conv2d 1x1": lambda: nn.Conv2d(5, 6, 1),
    "Conv3d": lambda: nn.Conv3d(4, 5, 2),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "experts": lambda: Experts(False),
    "transposed experts": lambda: Experts(True),
    "one of the experts": lambda: Experts(False, 1),
}
LINEAR = ("Linear", "Embedding", "ScaledEmbedding", "Conv1d", "Conv2d", "Conv2d 1x1", "Conv3d")


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lay = LAYERS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.lay(x, x, x)[0] if isinstance(x, Tensor) and self.is_attention else self.lay(x)

    @property
    def is_attention(self) -> bool:
        return hasattr(self.lay, "in_proj_weight") or isinstance(self.lay, nn.MultiheadAttention)


def example(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if "Embedding" in kind:
        return torch.tensor([[0, 1, 2, 3], [10, 2, 0, 9]])
    shapes = {"Linear": (2, 4, 8), "Conv1d": (2, 5, 7), "Conv2d": (2, 5, 6, 7), "Conv2d 1x1": (2, 5, 3, 3)}
    shapes |= {"Conv3d": (2, 4, 3, 4, 3), "MultiheadAttention": (2, 4, 8)}
    return torch.randn(shapes.get(kind, (2, 4, 6)), generator=generator, dtype=torch.float64)


def config_for(kind: str, cls: type = SpecLoRAConfig, **options: object) -> LoraConfig:
    targets = {"target_modules": [], "target_parameters": ["lay.up", "lay.down"]}
    chosen = targets if "experts" in kind else {"target_modules": ["lay"]}
    own = {"k": K} if cls is SpecLoRAConfig else {}
    return cls(**{"r": 2, "lora_alpha": 4} | own | chosen | options)


def adapted(kind: str, seed: int = 0, **options: object) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(Model(kind).double(), config_for(kind, **options), autocast_adapter_dtype=False)
    fill(model)
    return model


def fill(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)


def spec_layers(model: nn.Module) -> list[SpecLoRALayer]:
    return [module for module in model.modules() if isinstance(module, SpecLoRALayer)]


def masked(W: Tensor, d: Tensor, mode: str) -> Tensor:
    """Γ ⊙ W, or Eq. 4-6 with a full SVD, of a weight (d_out, d_in, *kernel), in numpy."""
    weight, factors = W.detach().numpy(), d.detach().numpy()
    k = len(factors)
    if mode.startswith("hadamard"):
        gamma = np.ones_like(weight)
        rows, columns = (slice(0, k), slice(0, k)) if mode == "hadamard" else (slice(-k, None), slice(-k, None))
        for i, value in zip(range(weight.shape[0])[rows], factors, strict=True):
            gamma[i, columns] = value
        return torch.from_numpy(gamma * weight)
    matrix = weight.reshape(weight.shape[0], -1)
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    chosen = slice(0, k) if mode == "svd" else slice(len(S) - k, None)
    U[:k, chosen] *= factors[:, None]
    return torch.from_numpy(((U * S) @ Vh).reshape(weight.shape))


def weights_of(kind: str, model: PeftModel, adapter: str = "default") -> list[tuple[nn.Module, str, Tensor]]:
    """The tensors that a layer's base computes with, and what the formula says that they are with the adapter."""
    result = []
    for layer in spec_layers(model):
        mask, base = layer.lora_spec[adapter], layer.get_base_layer()
        d = 1 + mask.weight
        if "Embedding" in kind:
            low_rank = layer.lora_embedding_B[adapter] @ layer.lora_embedding_A[adapter]
            W = (masked(base.weight.T, d, mask.mode) + layer.scaling[adapter] * low_rank).T
            result.append((base, "weight", W))
            continue
        A, B, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        if "experts" in kind:
            name = layer.parameter_name
            W = getattr(base, name)
            if W.dim() == 3:
                each = [w.T if base.is_transposed else w for w in W]
                E = len(each)
                new = [
                    masked(w, d[e], mask.mode) + scaling * (B.reshape(B.shape[0], -1, E)[:, :, e] @ A.chunk(E)[e])
                    for e, w in enumerate(each)
                ]
                W = torch.stack([w.T if base.is_transposed else w for w in new])
            else:
                W = masked(W, d, mask.mode) + scaling * B @ A
            result.append((base, name, W))
            continue
        name = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
        W = getattr(base, name)
        low_rank = torch.einsum("or...,ri...->oi...", B.expand(*B.shape[:2], *A.shape[2:]), A)
        result.append((base, name, masked(W, d, mask.mode) + scaling * low_rank))
    return result


def expected_output(kind: str, model: PeftModel, x: Tensor) -> Tensor:
    base = copy.deepcopy(model).unload()
    torch.manual_seed(0)
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    with torch.no_grad():
        for module, parameter, value in weights_of(kind, model):
            path = names[id(module)].replace(".base_layer", "")
            getattr(base.get_submodule(path), parameter).copy_(value)
        return base(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_output_is_that_of_the_formula(kind, mode):
    model, x = adapted(kind, mode=mode), example(kind)
    expected = expected_output(kind, model, x)
    assert not torch.allclose(expected, copy.deepcopy(model).unload()(x), rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_finite_differences(kind, mode):
    """Of all the adapter's parameters at once, along a random direction."""
    model, x = adapted(kind, mode=mode), example(kind)
    upstream = torch.randn_like(model(x))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (model(x) * upstream).sum().backward()
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    for part in ("lora_spec", "lora_"):
        chosen = {name: v for name, v in directions.items() if part in name}
        assert chosen
        slope = sum((parameters[name].grad * v).sum() for name, v in chosen.items())
        values = []
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    if name in chosen:
                        parameter += step * chosen[name]
                values.append((moved(x) * upstream).sum())
        assert slope.abs() > 1e-6
        torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "safe_merge"), [*((mode, False) for mode in MODES), ("hadamard", True)])
@pytest.mark.parametrize("kind", LAYERS)
def test_merging_writes_the_formula_s_weight_and_unmerging_takes_it_out(kind, mode, safe_merge):
    model, x = adapted(kind, mode=mode), example(kind)
    with torch.no_grad():
        spec_layers(model)[0].lora_spec["default"].weight[..., 0] = -1  # d = 0: nothing is left of a row to divide
        expected, before = expected_output(kind, model, x), copy.deepcopy(model).unload()(x)
        for _ in range(2):
            model.merge_adapter(safe_merge=safe_merge)
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.merge_and_unload(safe_merge=safe_merge)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_two_adapters_active_together_each_rescale_the_frozen_weight(kind):
    model, x = adapted(kind), example(kind)
    model.add_adapter("other", config_for(kind, r=1, k=2))
    model.base_model.set_adapter(["default", "other"])
    fill(model, seed=5)
    updates: dict[int, Tensor] = {}
    base = copy.deepcopy(model).unload()
    for adapter in ("default", "other"):
        for i, (module, parameter, value) in enumerate(weights_of(kind, model, adapter)):
            updates[i] = updates.get(i, 0) + value - getattr(module, parameter)
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    with torch.no_grad():
        for i, (module, parameter, _) in enumerate(weights_of(kind, model)):
            path = names[id(module)].replace(".base_layer", "")
            getattr(base.get_submodule(path), parameter).add_(updates[i])
        expected = base(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        model.merge_adapter(adapter_names=["default", "other"])
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        model.unmerge_adapter()
        model.delete_adapter("other")
        model.set_adapter("default")
        torch.testing.assert_close(model(x), expected_output(kind, model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in LINEAR if kind != "Linear"])
def test_mixed_batches(kind):
    model, x = adapted(kind), example(kind)
    model.add_adapter("other", config_for(kind, r=1, k=2))
    model.base_model.set_adapter("other")
    fill(model, seed=5)
    with torch.no_grad():
        alone = {"other": model.eval()(x)}
        model.set_adapter("default")
        alone["default"] = model(x)
        with model.disable_adapter():
            alone["__base__"] = model(x)
        for names in (["default", "other"], ["other", "__base__"], ["default", "default"]):
            mixed = model(x, adapter_names=names)
            for i, name in enumerate(names):
                torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["MultiheadAttention", "experts"])
def test_mixed_batches_are_refused_where_lora_refuses_them(kind):
    with pytest.raises((TypeError, ValueError), match="does not support mixed"):
        adapted(kind).eval()(example(kind), adapter_names=["default", "default"])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "low_cpu_mem_usage"), [("hadamard", False), ("hadamard", True), ("svd", True)])
@pytest.mark.parametrize("kind", LAYERS)
def test_saving_and_loading(kind, mode, low_cpu_mem_usage, tmp_path):
    model, x = adapted(kind, mode=mode), example(kind)
    with torch.no_grad():
        expected = model(x)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(
            Model(kind).double(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
        )
        torch.testing.assert_close(loaded(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(copy.deepcopy(loaded)(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pickle.loads(pickle.dumps(loaded))(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_adapter_changes_nothing_and_a_scale_of_zero_switches_it_off(kind):
    torch.manual_seed(0)
    base, x = Model(kind).double(), example(kind)
    with torch.no_grad():
        expected = copy.deepcopy(base)(x)
        model = get_peft_model(base, config_for(kind), autocast_adapter_dtype=False)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        fill(model)
        assert not torch.allclose(model(x), expected)
        for layer in spec_layers(model):
            layer.set_scale("default", 0)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_an_embedding_s_mask_touches_the_first_k_token_ids_alone():
    model = adapted("Embedding")
    layer = spec_layers(model)[0]
    with torch.no_grad():
        layer.lora_embedding_A["default"].zero_()
        change = model(torch.arange(11)) - layer.get_base_layer().weight
    assert (change[:K, :K] != 0).all()
    assert (change[K:] == 0).all()
    assert (change[:, K:] == 0).all()


def test_a_convolution_s_mask_pads_and_dilates_as_the_layer_does():
    """PEFT's factors know neither, so the term is looked at alone."""
    torch.manual_seed(0)
    base = nn.Conv1d(5, 6, 3, padding=2, dilation=2, padding_mode="circular").double()
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), SpecLoRAConfig(r=2, k=K, target_modules=["0"]))
    layer, x = spec_layers(model)[0], torch.randn(2, 5, 9, dtype=torch.float64)
    with torch.no_grad():
        d_minus_1 = layer.lora_spec["default"].weight.normal_()
        term = layer.add_mask_term("default", x, torch.zeros(2, 6, 9, dtype=torch.float64))
        base.weight.copy_(masked(base.weight, 1 + d_minus_1, "hadamard") - base.weight)
        base.bias.zero_()
        torch.testing.assert_close(term, base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_saved_keys_are_lora_s_and_one_more_a_module(tmp_path):
    from safetensors.torch import load_file

    for kind in LAYERS:
        plain = get_peft_model(Model(kind), config_for(kind, LoraConfig))
        plain.save_pretrained(tmp_path / "plain")
        adapted(kind).save_pretrained(tmp_path / "spec")
        keys = set(load_file(tmp_path / "spec" / "adapter_model.safetensors"))
        added = keys - set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
        assert keys - added == set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
        layers = [module for module in plain.modules() if isinstance(module, LoraLayer)]
        assert len(added) == len(layers)
        assert all(key.endswith("lora_spec.weight_hadamard") for key in added)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_grouped_convolutions_are_refused(cls, groups):
    model = nn.Sequential(nn.Linear(6, 6), cls(6, 6, 1, groups=groups))
    with pytest.raises(
        ValueError, match=rf"^SpecLoRA does not support grouped convolutions such as '1' \(groups={groups}"
    ):
        get_peft_model(model, SpecLoRAConfig(r=6, k=2, target_modules=["0", "1"]))
    assert [type(module) for module in model] == [nn.Linear, cls]


def test_an_injection_that_fails_half_way_is_taken_back():
    """PEFT finds out only when it comes to it that it has no layer for the last of these."""

    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(6, 6), nn.Embedding(5, 6), nn.MultiheadAttention(6, 2), nn.Conv1d(6, 6, 1), nn.Bilinear(6, 6, 6)
        )

    model = build()
    names = [str(i) for i in range(5)]
    with pytest.raises(ValueError, match=r"Bilinear.* is not supported"):
        get_peft_model(model, SpecLoRAConfig(r=2, k=2, target_modules=names))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build().named_modules()]

    model = get_peft_model(model, SpecLoRAConfig(r=2, k=2, target_modules=names[:3]))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"Bilinear.* is not supported"):
        model.add_adapter("second", SpecLoRAConfig(r=2, k=2, target_modules=names))
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
    assert all("second" not in layer.r and "second" not in layer.lora_spec for layer in spec_layers(model))
    model.add_adapter("second", SpecLoRAConfig(r=2, k=2, target_modules=names[:2]))
    assert len(model.state_dict()) == len(keys) + 2 * 3


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
def test_in_bfloat16_it_is_near_float64(kind):
    reference, x = adapted(kind), example(kind)
    with torch.no_grad():
        expected = reference(x)
        low = copy.deepcopy(reference).to(torch.bfloat16)
        actual = low(x if "Embedding" in kind else x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "experts" not in kind])  # PEFT's use autocast("meta")
def test_meta_tensors_propagate(kind):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Model(kind), config_for(kind))
        x = example(kind).to("meta")
        out = model(x if "Embedding" in kind else x.float())
    assert out.device.type == "meta"
    assert F.mse_loss(out, out).device.type == "meta"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_cuda_agrees_with_the_cpu(kind, mode):
    model, x = adapted(kind, mode=mode), example(kind)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-9, atol=1e-9)
