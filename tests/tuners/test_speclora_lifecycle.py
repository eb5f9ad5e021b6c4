"""What LoRA can do inside PEFT, done with SpecLoRA: variants, initializations, combinations, and where they are refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from closeness import assert_close_outputs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import BdLoraConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.tuners.speclora import SpecLoRALayer

K = 3


class Net(nn.Module):
    """One module of each kind that DoRA knows, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3)
        self.conv3 = nn.Conv3d(1, 3, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.lin(self.emb(ids)).mT  # (N, 6, T)
        hidden = self.conv2(self.conv1(hidden)[:, None])  # (N, 4, 3, T - 2)
        return self.head(self.conv3(hidden[:, None]).flatten(2).mean(-1))


IDS = torch.tensor([[0, 1, 2, 3, 10], [10, 2, 0, 9, 1]])
TARGETS = ["emb", "lin", "conv1", "conv2", "conv3"]


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.v_proj(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def fill(model: nn.Module, seed: int = 1, std: float = 0.4) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std)
    return model


def spec(base: nn.Module, targets: list[str] | str | None = None, **options: object) -> PeftModel:
    settings = {"r": 2, "lora_alpha": 4, "k": K, "target_modules": targets or TARGETS} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpecLoRA: `k` is clipped")
        return get_peft_model(base, SpecLoRAConfig(**settings), autocast_adapter_dtype=False)


def layers(model: nn.Module) -> dict[str, SpecLoRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpecLoRALayer)}


def masked(W: Tensor, d: Tensor) -> Tensor:
    gamma = torch.ones_like(W)
    for i in range(len(d)):
        gamma[i, : len(d)] = d[i]
    return gamma * W


def test_dora_normalizes_the_masked_weight_with_the_low_rank_update():
    """m · V / ‖V‖ with V = Γ ⊙ W + scaling · BA and the norm over everything but the output dimension."""
    model, plain = fill(spec(net(), use_dora=True)), net()
    for name, layer in layers(model).items():
        base, mask = layer.get_base_layer(), layer.lora_spec["default"]
        is_embedding = isinstance(base, nn.Embedding)
        W = base.weight.T if is_embedding else base.weight
        if is_embedding:
            low_rank = layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]
        else:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            low_rank = torch.einsum("or...,ri...->oi...", B.expand(*B.shape[:2], *A.shape[2:]), A)
        V = masked(W, 1 + mask.weight) + 2 * low_rank
        norm = V.flatten(1).norm(dim=1)
        m = layer.lora_magnitude_vector["default"].weight.flatten()
        W = V * (m / norm).reshape(-1, *[1] * (V.dim() - 1))
        target = plain.get_submodule(name.removeprefix("base_model.model."))
        target.weight.data = (W.T if is_embedding else W).detach()
    with torch.no_grad():
        expected = plain(IDS)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(IDS), expected, rtol=1e-9, atol=1e-9)
        for layer in layers(model).values():
            layer.set_scale("default", 0)
        without = model(IDS)
        for layer in layers(model).values():
            layer.lora_spec["default"].weight.zero_()
        torch.testing.assert_close(model(IDS), without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", ["emb", "lin", "conv2"])
@pytest.mark.parametrize("dora", [("b",), ("a", "c"), ("b", "c"), ("c",)])
def test_dora_beside_other_adapters_computes_what_merging_them_in_turn_writes(dora, target):
    model = spec(net(), [target], use_dora="a" in dora)
    for name in "bc":
        model.add_adapter(
            name, SpecLoRAConfig(r=2, k=2, mode="hadamard_bottom", target_modules=[target], use_dora=name in dora)
        )
        model.set_adapter(name)
    model.base_model.set_adapter(["default", "b", "c"])
    fill(model)
    with torch.no_grad():
        expected = model(IDS)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)


def test_dora_starts_as_the_base_and_trains_everything(tmp_path):
    base = net()
    expected = base(IDS).detach()
    model = spec(base, use_dora=True, lora_dropout=0.1)
    torch.testing.assert_close(model.eval()(IDS), expected, rtol=1e-9, atol=1e-9)
    fill(model.train())(IDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="^SpecLoRA does not support `lora_alpha=0`"):
        spec(net(), use_dora=True, lora_alpha=0)


def test_activated_lora_adds_the_whole_update_to_the_tokens_after_the_invocation(tiny_llama, token_ids):
    base, layer_name = tiny_llama(torch.float64), "model.layers.0.self_attn.q_proj"
    options = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    model = fill(spec(base, [layer_name], **options)).eval()
    layer = layers(model)[f"base_model.model.{layer_name}"]
    with torch.no_grad():
        x = torch.randn(2, 7, 32, dtype=torch.float64)
        before = layer.get_base_layer()(x)
        after = before + x @ layer.get_delta_weight("default").T
        out = layer(x.clone(), alora_offsets=[3, None])
        torch.testing.assert_close(out[0, :4], before[0, :4])
        torch.testing.assert_close(out[0, 4:], after[0, 4:])
        torch.testing.assert_close(out[1], before[1])

        token_ids[0, 3:5] = torch.tensor([5, 6])
        whole = model(input_ids=token_ids).logits
        with model.disable_adapter():
            unadapted = model(input_ids=token_ids).logits
        torch.testing.assert_close(whole[0, :3], unadapted[0, :3])
        assert not torch.allclose(whole[0, 3:], unadapted[0, 3:])
        torch.testing.assert_close(whole[1], unadapted[1])
    with pytest.raises(NotImplementedError, match="aLoRA"):
        model.merge_adapter()


ADDITIVE = {
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=2)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2)},
    "BD-LoRA, A": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["lin"], nblocks=2)},
    "BD-LoRA, B": {"use_bdlora": BdLoraConfig(target_modules_bd_b=["lin"], nblocks=2)},
    **({"KaSA": {"kasa_config": lora.KasaConfig()}} if hasattr(lora, "KasaConfig") else {}),  # since PEFT 0.21
    "MiCA": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("variant", ADDITIVE)
def test_a_variant_s_term_and_the_mask_s_stand_side_by_side(variant, tmp_path):
    """Against PEFT's own layer with the same factors, and the mask's term by the formula."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["lin"]} | ADDITIVE[variant]
    # PEFT computes what these two take from the base weight in float32, and MiCA takes no other
    dtype = torch.float32 if variant in ("KaSA", "MiCA") else torch.float64
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.manual_seed(3)
    plain = get_peft_model(net().to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
    torch.manual_seed(3)
    model = fill(spec(net().to(dtype), ["lin"], **ADDITIVE[variant])).eval()
    weights = {name: value for name, value in model.state_dict().items() if "lora_spec" not in name}
    plain.load_state_dict(weights)
    plain.eval()
    layer, x = layers(model)["base_model.model.lin"], torch.randn(3, 8, dtype=dtype)
    with torch.no_grad():
        W = layer.get_base_layer().weight.clone()
        d = 1 + layer.lora_spec["default"].weight
        expected = plain.base_model.model.lin(x) + x @ (masked(W, d) - W).T
        torch.testing.assert_close(layer(x), expected, **close)
        for safe_merge in (False, True):
            model.merge_adapter(safe_merge=safe_merge)
            torch.testing.assert_close(layer(x), expected, **close)
            model.unmerge_adapter()
            torch.testing.assert_close(layer(x), expected, **close)
    model.train()(IDS).square().sum().backward()
    assert layer.lora_spec["default"].weight.grad.abs().sum() > 0

    model.eval().save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            net().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
        ).eval()
        with torch.no_grad():
            merged = copy.deepcopy(loaded).merge_and_unload()
            torch.testing.assert_close(merged.lin(x), expected, **close)
            torch.testing.assert_close(layers(loaded)["base_model.model.lin"](x), expected, **close)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_4", "olora"])
def test_every_initialization(init, tmp_path):
    """Those that change the base weight are of that weight: loading makes the same one again."""
    base = net().float()
    expected = base(IDS).detach()
    torch.manual_seed(4)
    model = spec(base, ["lin"], init_lora_weights=init).eval()
    if init is not False:
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    fill(model)
    layer, x = layers(model)["base_model.model.lin"], torch.randn(3, 8)
    with torch.no_grad():
        W = layer.get_base_layer().weight
        low_rank = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        wanted = x @ (masked(W, 1 + layer.lora_spec["default"].weight) + low_rank).T + layer.get_base_layer().bias
        torch.testing.assert_close(layer(x), wanted)
    model.save_pretrained(tmp_path)
    if init != "pissa_niter_4":  # drawn at random: PEFT itself does not make the same base again
        loaded = PeftModel.from_pretrained(net().float(), tmp_path).eval()
        torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        *([{"kasa_config": lora.KasaConfig()}] if hasattr(lora, "KasaConfig") else []),  # since PEFT 0.21
    ],
)
@pytest.mark.parametrize("cls", [SpecLoRAConfig, FisherLoRAConfig])
def test_a_failed_injection_leaves_the_base_weights_as_they_were(cls, options):
    base = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="LayerNorm"):
        get_peft_model(base, cls(r=2, target_modules=["0", "1"], **options))
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("cls", [SpecLoRAConfig, FisherLoRAConfig])
def test_an_adapter_of_a_changed_weight_is_saved_as_one_of_the_original_or_refused(cls, tmp_path):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]} | ({"k": K} if cls is SpecLoRAConfig else {"r_q": 1})
    base = Projections().float()
    model = get_peft_model(copy.deepcopy(base), cls(**settings, init_lora_weights="olora"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "olora"
    fill(model)
    if cls is SpecLoRAConfig:
        with pytest.raises(NotImplementedError, match="^SpecLoRA does not support `path_initial_model_for_weight"):
            model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
        assert list(model.peft_config) == ["default"]
        return
    x = torch.randn(3, 8)
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)


def prune(values: Tensor, density: float) -> Tensor:
    kept = values.abs() >= values.abs().sort(descending=True).values[int(density * len(values)) - 1]
    return values * kept


def combined(kind: str, deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """The masks' combination, written out."""
    if kind in ("linear", "cat", "svd"):
        return sum(w * v for w, v in zip(weights, deltas, strict=True))
    pruned = torch.stack([prune(v, density) for v in deltas])
    weighted = pruned * torch.tensor(weights, dtype=pruned.dtype)[:, None]
    if kind == "magnitude_prune":
        return weighted.sum(0)
    sign = torch.where(pruned.sum(0) >= 0, 1, -1)
    agrees = pruned.sign() == sign
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_weighted_adapters(kind, tmp_path):
    density, weights = 0.7, [0.7, -0.4]
    model = fill(spec(net(), ["emb", "lin"]))
    model.add_adapter("other", SpecLoRAConfig(r=2, lora_alpha=6, k=K, target_modules=["emb", "lin"]))
    model.set_adapter("other")
    fill(model, seed=5)
    for layer in layers(model).values():
        layer.set_scale("other", 0.5)  # what the masks follow, their combination follows
    plain = get_peft_model(
        net(), LoraConfig(r=2, lora_alpha=4, target_modules=["emb", "lin"]), autocast_adapter_dtype=False
    )
    plain.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["emb", "lin"]))
    plain.load_state_dict({name: v for name, v in model.state_dict().items() if "lora_spec" not in name})
    for module in plain.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("other", 0.5)
    arguments = {"combination_type": kind, "density": density}
    plain.add_weighted_adapter(["default", "other"], weights, "both", **arguments)
    model.add_weighted_adapter(["default", "other"], weights, "both", **arguments)
    model.set_adapter("both")
    plain.set_adapter("both")
    for name, layer in layers(model).items():
        deltas = [layer.lora_spec["default"].weight, layer.lora_spec["other"].weight * 0.5]
        expected = combined(kind.removesuffix("_svd"), [d.detach() for d in deltas], weights, density)
        torch.testing.assert_close(layer.lora_spec["both"].weight.detach(), expected)
        with torch.no_grad(), layer.mask_off():
            torch.testing.assert_close(
                layer.get_delta_weight("both"), plain.get_submodule(name).get_delta_weight("both"), atol=1e-9, rtol=1e-6
            )
    expected = model(IDS).detach()
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(net(), tmp_path / "both", autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(IDS), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_combinations_of_different_modules_ranks_and_ks(kind, tmp_path):
    """Each module has its own, and they are recorded: what is saved can be loaded."""
    model = fill(spec(net(), ["emb", "lin"], rank_pattern={"lin": 1}, k_pattern={"lin": 2}))
    second = SpecLoRAConfig(r=3, lora_alpha=6, k=2, target_modules=["lin", "conv2"], k_pattern={"conv2": 1})
    model.add_adapter("other", second)
    model.set_adapter("other")
    fill(model, seed=5)
    expected = {}
    for name, layer in layers(model).items():
        parts = [w * layer.get_delta_weight(a) for a, w in (("default", 0.5), ("other", 2)) if a in layer.lora_spec]
        expected[name] = sum(parts).detach()
    if kind == "svd":  # PEFT's takes no kernels of convolutions of more than one input channel, nor do these tests
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type=kind, svd_rank=6)
    else:
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type=kind)
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("both").detach(), expected[name], rtol=1e-8, atol=1e-8)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(net(), tmp_path / "both", autocast_adapter_dtype=False)
    for name, layer in layers(loaded).items():
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 40), (40, 4), (5, 5)])
def test_an_svd_combination_of_more_ranks_than_the_matrix_has(shape):
    torch.manual_seed(0)
    model = fill(spec(nn.Sequential(nn.Linear(shape[1], shape[0])).double(), ["0"]))
    model.add_adapter("other", SpecLoRAConfig(r=2, lora_alpha=6, k=K, target_modules=["0"]))
    model.set_adapter("other")
    fill(model, seed=5)
    layer = layers(model)["base_model.model.0"]
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", svd_rank=20)
    assert layer.r["both"] == layer.lora_A["both"].weight.shape[0] == layer.lora_B["both"].weight.shape[1] == 20
    expected = 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("both").detach(), expected.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties_svd"])
def test_weighted_adapters_by_chance(kind):
    """Dropped at random: kept entries are rescaled, the others zero."""
    model = fill(spec(net(), ["lin"]))
    model.add_adapter("other", SpecLoRAConfig(r=2, k=K, target_modules=["lin"]))  # whose d is 1
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "thinned", combination_type=kind, density=0.5)
    mask = layers(model)["base_model.model.lin"].lora_spec
    ratio = (mask["thinned"].weight / mask["default"].weight).detach()
    assert all(value in (0, 2) for value in ratio.tolist())


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ({"k": 2}, NotImplementedError, "add_weighted_adapter for adapters that differ in k or mode"),
        ({"mode": "svd"}, NotImplementedError, "add_weighted_adapter for adapters that differ in k or mode"),
        ({"rank_pattern": {"lin": 1}}, ValueError, "combination_type='linear' for different ranks"),
        ({"use_dora": True}, ValueError, "a weighted combination of adapter 'other'.*loses what `use_dora` adds"),
    ],
)
def test_adapters_that_have_no_combination_are_refused_and_nothing_is_left(other, error, message):
    model = fill(spec(net(), ["lin"]))
    model.add_adapter("other", SpecLoRAConfig(**{"r": 2, "k": K, "target_modules": ["lin"]} | other))
    keys = list(model.state_dict())
    with pytest.raises(error, match=f"^SpecLoRA does not support {message}"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="linear")
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default", "other"]


@pytest.mark.parametrize("cls", [SpecLoRAConfig, FisherLoRAConfig])
def test_a_combination_needs_a_weight_for_each_adapter(cls):
    model = get_peft_model(net(), cls(r=2, target_modules=["lin"]))
    model.add_adapter("other", cls(r=2, target_modules=["lin"]))
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=f"^{cls.__name__.removesuffix('Config')}: `weights` must .* 2 adapters; got 1"
    ):
        model.add_weighted_adapter(["default", "other"], [1.0], "both", combination_type="linear")
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default", "other"]


def test_modules_to_save_biases_and_patterns(tmp_path):
    model = spec(
        net(),
        ["emb", "lin", "conv1"],
        modules_to_save=["head"],
        bias="lora_only",
        use_rslora=True,
        rank_pattern={"lin": 1},
        alpha_pattern={"conv1": 3},
        k_pattern={"lin": 2},
        exclude_modules=["emb"],
    )
    fill(model)
    assert set(layers(model)) == {"base_model.model.lin", "base_model.model.conv1"}
    lin, conv = layers(model).values()
    assert lin.lora_A["default"].weight.shape[0] == 1
    assert lin.lora_spec["default"].k == 2
    assert conv.lora_spec["default"].k == K
    assert lin.scaling["default"] == 4
    assert conv.scaling["default"] == pytest.approx(3 / 2**0.5)
    assert lin.get_base_layer().bias.requires_grad
    expected = model(IDS).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(IDS), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded.merge_and_unload()(IDS), expected, rtol=1e-10, atol=1e-10)


def test_lora_bias():
    model = fill(spec(net(), ["lin", "conv2"], lora_bias=True))
    expected = model(IDS).detach()
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(IDS), expected, rtol=1e-10, atol=1e-10)


def test_layers_to_transform(tiny_llama):
    model = spec(tiny_llama(), ["q_proj"], layers_to_transform=[1])
    assert list(layers(model)) == ["base_model.model.model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("ensure", [False, True])
def test_tied_weights(tiny_llama, token_ids, ensure):
    base = tiny_llama(tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ensure:
            with pytest.raises(ValueError, match="^SpecLoRA does not support ensure_weight_tying=True"):
                spec(base, ["embed_tokens", "lm_head"], ensure_weight_tying=True)
            assert type(base.lm_head) is nn.Linear
            assert type(base.model.embed_tokens) is nn.Embedding
            return
        model = fill(spec(base, ["embed_tokens"]))
    head = model.get_base_model().lm_head.weight
    expected = model(input_ids=token_ids).logits.detach()
    assert head is model.get_base_model().model.embed_tokens.get_base_layer().weight
    assert not torch.allclose(expected, tiny_llama(tie_word_embeddings=True)(input_ids=token_ids).logits)


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_autocast_adapter_dtype_reaches_the_mask(tiny_llama, autocast_adapter_dtype):
    config = SpecLoRAConfig(r=2, k=K, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype)
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}


def test_peft_s_own_conversion_to_lora_has_the_mask_in_it():
    model = fill(spec(net(), ["lin"]))
    config, state = convert_to_lora(model, rank=6)
    assert config.peft_type == "LORA"
    A, B = (next(value for key, value in state.items() if part in key).double() for part in ("lora_A", "lora_B"))
    layer = layers(model)["base_model.model.lin"]
    delta = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(config.lora_alpha / config.r * B @ A, delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", [SpecLoRAConfig, FisherLoRAConfig])
def test_ephemeral_offload_changes_nothing_where_there_is_no_accelerator(cls):
    """It is about where DoRA's and PiSSA's set-up computes; here all of it is on the CPU."""
    x, outputs = torch.randn(3, 8), []
    for ephemeral in (False, True):
        torch.manual_seed(0)
        runtime = lora.LoraRuntimeConfig(ephemeral_gpu_offload=ephemeral)
        config = cls(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", runtime_config=runtime)
        model = get_peft_model(Projections().float(), config)
        assert model.get_base_model().q_proj.ephemeral_gpu_offload is ephemeral
        outputs.append(fill(model)(x).detach())
    assert_close_outputs(*outputs)
