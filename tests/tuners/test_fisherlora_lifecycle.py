"""FisherLoRA through the life of an adapter: each step gives what the LoRA with the same patterns gives."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from closeness import assert_close_outputs
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import FisherLoRAConfig

KINDS = {
    "linear": (lambda: nn.Linear(6, 6), (4, 6)),
    "transformers_conv1d": (lambda: Conv1D(6, 6), (4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), None),
    "conv1d": (lambda: nn.Conv1d(6, 6, 3), (4, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3), (4, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 6, 2), (4, 6, 3, 3, 3)),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), (4, 3, 6)),
}
R, R_Q, ALPHA = 5, 2, 10


class Pair(nn.Module):
    """A query and a value layer of one kind, and a linear layer that is neither."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        make, _ = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.q_proj, self.v_proj, self.head = make(), make(), nn.Linear(6, 3)

    def forward(self, x):
        outputs = [m(x, x, x)[0] if "Attention" in type(m).__name__ else m(x) for m in (self.q_proj, self.v_proj)]
        hidden = torch.tanh(outputs[0]) + outputs[1]
        return self.head(hidden.flatten(2).mean(2) if hidden.ndim > 2 and hidden.shape[1] == 6 else hidden)


def example(kind="linear"):
    generator = torch.Generator().manual_seed(5)
    shape = KINDS[kind][1]
    return torch.arange(9).repeat(2, 1) if shape is None else torch.randn(shape, generator=generator)


def fisher(**options):
    return FisherLoRAConfig(
        **{"r": R, "r_q": R_Q, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]} | options
    )


def plain(**options):
    """The LoRA that `fisher` of the same options stands for."""
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]} | options
    ratio = R_Q / options["r"]
    alpha = options["lora_alpha"] * (math.sqrt(ratio) if options.get("use_rslora") else ratio)
    return LoraConfig(**options, rank_pattern={"q_proj": R_Q}, alpha_pattern={"q_proj": alpha})


def adapted(config, kind="linear", seed=3):
    torch.manual_seed(seed)
    return get_peft_model(Pair(kind), config).eval()


def layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, tmp_path):
    config, x = {"init_lora_weights": False}, example(kind)
    model, oracle = adapted(fisher(**config), kind), adapted(plain(**config), kind)
    ranks = {name: layer.r["default"] for name, layer in layers(model).items()}
    assert (ranks["q_proj"], ranks["v_proj"]) == (R_Q, R)
    expected = oracle(x)
    assert_close_outputs(model(x), expected)
    assert not torch.allclose(expected, Pair(kind)(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Pair(kind), tmp_path).eval()
    assert_close_outputs(loaded(x), expected)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(model(x), Pair(kind)(x), atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"init_lora_weights": init}
            for init in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica")
        ),
        {"init_lora_weights": False, "use_rslora": True},
        {"init_lora_weights": False, "use_dora": True},
        {"init_lora_weights": False, "lora_bias": True},
        {"init_lora_weights": False, "bias": "all"},
        {"init_lora_weights": False, "bias": "lora_only"},
        {"init_lora_weights": False, "modules_to_save": ["head"]},
        {"init_lora_weights": False, "target_modules": "all-linear", "exclude_modules": ["head"]},
        {"init_lora_weights": False, "target_modules": r"(q|v)_proj"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items() if value is not False),
)
def test_every_option_does_what_it_does_in_lora(options, tmp_path):
    if options["init_lora_weights"] == "orthogonal":
        options = options | {"r": 4}  # PEFT wants even ranks there
    model, oracle = adapted(fisher(**options)), adapted(plain(**options))
    x = example()
    state = oracle.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    wanted = {name for name, parameter in oracle.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    assert_close_outputs(model(x), oracle(x))
    if not isinstance(options["init_lora_weights"], str):
        model.save_pretrained(tmp_path)
        assert_close_outputs(PeftModel.from_pretrained(Pair(), tmp_path).eval()(x), model(x))


@pytest.mark.parametrize("ranks", [{}, {"r": 4, "r_q": 4}, {"r_v": 3}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_can_be_saved_for_the_original(init, ranks, tmp_path):
    model = adapted(fisher(init_lora_weights=init, **ranks))
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.ones_like(parameter), alpha=0.3)
    expected = model(example())
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(Pair(), tmp_path / "converted").eval()
    assert torch.allclose(loaded(example()), expected, atol=1e-4)


def test_adapters_come_and_go():
    x, config = example(), {"init_lora_weights": False}
    model = adapted(fisher(**config))
    first = model(x)
    torch.manual_seed(4)
    model.add_adapter("other", fisher(r=3, r_q=1, lora_alpha=9, **config))
    assert_close_outputs(model(x), first)
    model.set_adapter("other")
    second = model(x)
    assert {name: layer.r["other"] for name, layer in layers(model).items()} == {"q_proj": 1, "v_proj": 3}
    assert {layer.scaling["other"] for layer in layers(model).values()} == {3.0}
    mixed = model(x, adapter_names=["default", "other", "__base__", "default"])
    rows = torch.stack([first[0], second[1], Pair()(x)[2], first[3]])
    assert torch.allclose(mixed, rows, atol=1e-6)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), both, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert all(set(layer.r) == {"other"} for layer in layers(model).values())
    model.set_adapter("other")
    assert torch.allclose(model(x), second, atol=1e-6)


def test_the_scale_can_be_changed():
    model = adapted(fisher(init_lora_weights=False))
    x, expected = example(), model(example())
    with rescale_adapter_scale(model, 0.5):
        assert {layer.scaling["default"] for layer in layers(model).values()} == {1.0}
    assert_close_outputs(model(x), expected)
    for layer in layers(model).values():
        layer.set_scale("default", 0)
    assert_close_outputs(model(x), Pair()(x))


def test_layers_to_transform_and_patterns_of_one_layer():
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList(Pair() for _ in range(3))
    config = fisher(layers_to_transform=[0, 2], rank_pattern={r"layers\.2\.q_proj": 3})
    ranks = {name: layer.r["default"] for name, layer in layers(get_peft_model(model, config)).items()}
    ranks = {name.removeprefix("decoder."): rank for name, rank in ranks.items()}
    assert ranks == {"layers.0.q_proj": 2, "layers.0.v_proj": 5, "layers.2.q_proj": 3, "layers.2.v_proj": 5}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_state_dict_can_be_put_in(low_cpu_mem_usage):
    model = adapted(fisher(init_lora_weights=False))
    other = get_peft_model(Pair(), fisher(), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert_close_outputs(other(example()), model(example()))


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_adapter_dtype(autocast):
    model = get_peft_model(Pair().to(torch.bfloat16), fisher(), autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}


@pytest.mark.parametrize("changes", [{}, {"r": 3, "lora_alpha": 6}, {"r": 8, "lora_alpha": 16}])
def test_hotswap_to_another_rank_at_the_same_scaling(changes, tmp_path):
    other = adapted(fisher(init_lora_weights=False, **changes), seed=9)
    other.save_pretrained(tmp_path)
    model = adapted(fisher(init_lora_weights=False))
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.allclose(model(example()), other(example()), atol=1e-6)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.weights)


class Experts(nn.Module):
    """Query and value layers, of which the weights are targeted, and a stack of expert weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.q_proj, self.v_proj, self.experts = nn.Linear(6, 6), nn.Linear(6, 6), Stack()

    def forward(self, x):
        return self.experts(torch.tanh(self.q_proj(x)) + self.v_proj(x))


PARAMETERS = ["q_proj.weight", "v_proj.weight", "experts.weights"]


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, [2, 5, 5]),
        ({"r_v": 3}, [2, 3, 5]),
        ({"rank_pattern": {r"experts\.weights": 4, "v_proj.weight": 1}}, [2, 1, 4]),
    ],
)
@pytest.mark.filterwarnings("error:.*did not match any targeted module")
def test_parameters_have_the_roles_of_their_modules(options, ranks, tmp_path):
    torch.manual_seed(0)
    config = fisher(target_modules=[], target_parameters=PARAMETERS, init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(Experts()), config).eval()
    by_name = {name.rpartition(".")[2]: layer for name, layer in layers(model).items()}
    assert [by_name[n].r["default"] for n in ("q_proj", "v_proj", "experts")] == ranks
    assert [tuple(layer.lora_A["default"].weight.shape) for layer in by_name.values()] == [
        (ranks[0], 6),
        (ranks[1], 6),
        (ranks[2] * 3, 6),
    ]
    assert {layer.scaling["default"] for layer in by_name.values()} == {ALPHA / R}
    x = example()
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert_close_outputs(PeftModel.from_pretrained(nn.Sequential(Experts()), tmp_path).eval()(x), expected)
    model.add_adapter("second", fisher(target_modules=[], target_parameters=PARAMETERS, r=7, r_q=3))
    assert {n: layer.r["second"] for n, layer in by_name.items()} == {"q_proj": 3, "v_proj": 7, "experts": 7}
    assert torch.allclose(model.merge_and_unload(adapter_names=["default"])(x), expected, atol=1e-4)


def test_a_pattern_that_matches_no_parameter_is_warned_of_once(recwarn):
    config = fisher(target_modules=[], target_parameters=PARAMETERS, rank_pattern={"nowhere": 3})
    get_peft_model(nn.Sequential(Experts()), config)
    assert len([w for w in recwarn if "did not match any targeted module" in str(w.message)]) == 1


TYPES = [
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
]
WEIGHTS = [0.7, -0.3]


def combined(kind, combination, second=None, **options):
    """A model with two adapters and their combination, and the update of each adapter by module, in float64."""
    config = {"init_lora_weights": False} | options
    model = adapted(fisher(**config), kind)
    torch.manual_seed(8)
    model.add_adapter("b", fisher(**config | (second or {})))
    deltas = {
        name: [layer.get_delta_weight(a).detach().double() for a in ("default", "b")]
        for name, layer in layers(model).items()
        if not name.endswith("out_proj")
    }
    density = None if combination in ("svd", "linear", "cat") else 0.6
    model.add_weighted_adapter(["default", "b"], WEIGHTS, "both", combination, density=density)
    return model, deltas


def round_trip(model, kind, path):
    model.set_adapter("both")
    model.eval()
    model.save_pretrained(path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(Pair(kind), path / "both").eval()
    assert torch.allclose(loaded(example(kind)), model(example(kind)), atol=1e-6)
    for name, layer in layers(loaded).items():
        assert layer.scaling["default"] == pytest.approx(1.0)
        assert layer.r["default"] == layers(model)[name].r["both"], name


@pytest.mark.parametrize("second", [{}, {"r_q": 3}, {"r": 4, "lora_alpha": 2, "r_q": 1}], ids=["same", "r_q", "r"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("combination", TYPES)
def test_a_weighted_combination_is_right_or_refused(combination, second, rslora, tmp_path):
    options = {"use_rslora": rslora}
    if second and not (combination == "cat" or combination.endswith("svd")):
        model = adapted(fisher(**options))
        model.add_adapter("b", fisher(**options, **second))
        before, state = dict(model.peft_config), copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError, match=r"^FisherLoRA does not support .*same r value.*'cat', or a type that ends in 'svd'"
        ):
            model.add_weighted_adapter(["default", "b"], WEIGHTS, "both", combination, density=0.6)
        assert dict(model.peft_config) == before
        assert model.state_dict().keys() == state.keys()
        return
    model, deltas = combined("linear", combination, second, **options)
    wanted = {"q_proj": R_Q, "v_proj": R}
    sums = {"q_proj": R_Q + second.get("r_q", R_Q), "v_proj": R + second.get("r", R)}
    if combination == "cat":
        wanted = sums
    elif combination.endswith("svd"):
        largest = max(R, R_Q, second.get("r", R), second.get("r_q", R_Q))
        wanted = dict.fromkeys(sums, largest)
    for name, layer in layers(model).items():
        assert layer.r["both"] == layer.lora_A["both"].weight.shape[0] == wanted[name]
        total = sum(w * d for w, d in zip(WEIGHTS, deltas[name], strict=True)).numpy()
        if combination == "svd":
            U, s, Vh = np.linalg.svd(total)
            total = (U[:, : wanted[name]] * s[: wanted[name]]) @ Vh[: wanted[name]]
        elif combination == "linear":
            A = [layer.lora_A[a].weight.detach().double().numpy() for a in ("default", "b")]
            B = [layer.lora_B[a].weight.detach().double().numpy() for a in ("default", "b")]
            w = [weight * layer.scaling[a] for weight, a in zip(WEIGHTS, ("default", "b"), strict=True)]
            total = sum(abs(v) ** 0.5 * b for v, b in zip(w, B, strict=True)) @ sum(
                np.sign(v) * abs(v) ** 0.5 * a for v, a in zip(w, A, strict=True)
            )
        elif combination != "cat":
            continue
        actual = layer.get_delta_weight("both").detach().double().numpy()
        np.testing.assert_allclose(actual, total, atol=2e-5)
    round_trip(model, "linear", tmp_path)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
def test_a_weighted_combination_of_other_layers(kind, combination, tmp_path):
    if combination == "svd" and kind in ("conv1d", "conv3d"):
        with pytest.raises(
            ValueError,
            match=r"^FisherLoRA does not support .* for Conv1d and Conv3d layers such as 'q_proj'. Use 'cat'",
        ):
            combined(kind, combination)
        return
    model, deltas = combined(kind, combination)
    if combination == "cat":
        for name, parts in deltas.items():
            total = sum(w * d for w, d in zip(WEIGHTS, parts, strict=True))
            actual = layers(model)[name].get_delta_weight("both").detach().double()
            assert torch.allclose(actual, total, atol=2e-5)
    round_trip(model, kind, tmp_path)


@pytest.mark.parametrize("svd_rank", [None, 3, 100])
def test_svd_combinations_have_the_rank_asked_for(svd_rank, tmp_path):
    """Ranks beyond those of the matrix are zero, and are there: what is saved can be loaded."""
    model = adapted(fisher(r=16, r_q=4, init_lora_weights=False))
    model.add_weighted_adapter(["default"], [1.0], "one")
    model.add_adapter("b", fisher(r=16, r_q=4, init_lora_weights=False))
    model.add_weighted_adapter(["default", "b"], WEIGHTS, "both", "svd", svd_rank)
    rank = svd_rank or 16
    for layer in layers(model).values():
        assert layer.r["both"] == layer.lora_A["both"].weight.shape[0] == rank
        total = sum(w * layer.get_delta_weight(a).detach() for w, a in zip(WEIGHTS, ("default", "b"), strict=True))
        U, s, Vh = np.linalg.svd(total.double().numpy(), full_matrices=False)
        best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        np.testing.assert_allclose(layer.get_delta_weight("both").detach().double().numpy(), best, atol=2e-5)
    round_trip(model, "linear", tmp_path)


@pytest.mark.parametrize("flag", ["use_dora", "lora_bias"])
def test_a_combination_that_would_lose_something_is_refused(flag):
    model = adapted(fisher(**{flag: True}))
    model.add_adapter("b", fisher())
    with pytest.raises(
        ValueError, match=rf"^FisherLoRA does not support .* adapter 'default', because it loses what `{flag}` adds"
    ):
        model.add_weighted_adapter(["default", "b"], WEIGHTS, "both")
    assert list(model.peft_config) == ["default", "b"]


def test_a_combination_that_fails_half_way_leaves_nothing():
    model = adapted(fisher())
    model.add_adapter("b", fisher())
    keys = model.state_dict().keys()
    with pytest.raises(RuntimeError, match="quantile"):
        model.add_weighted_adapter(["default", "b"], WEIGHTS, "both", "svd", svd_clamp=7)
    assert list(model.peft_config) == ["default", "b"]
    assert model.state_dict().keys() == keys
    assert model.active_adapters == ["default"]


def test_all_linear_leaves_tied_weights_to_peft(tiny_llama):
    """PEFT ties by the names that were given; "all-linear" names neither of the two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cls in (LoraConfig, FisherLoRAConfig):
            config = cls(target_modules="all-linear", ensure_weight_tying=True)
            model = get_peft_model(tiny_llama(tie_word_embeddings=True), config)
            assert type(model.get_base_model().model.embed_tokens) is nn.Embedding
            assert type(model.get_base_model().lm_head) is nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_injection_by_the_state_dict_of_a_compiled_model(tiny_llama, compiled):
    """torch.compile puts `_orig_mod.` before the names, in the model or in the state dict."""
    config = FisherLoRAConfig(r=6, r_q=2, target_modules=["q_proj", "v_proj"])
    source = inject_adapter_in_model(config, tiny_llama())
    state = get_peft_model_state_dict(source)
    prefixed = {f"_orig_mod.{name}": value for name, value in state.items()}
    target = torch.compile(tiny_llama()) if compiled else tiny_llama()
    model = inject_adapter_in_model(config, target, state_dict=state if compiled else prefixed)
    shapes = {name.removeprefix("_orig_mod."): v.shape for name, v in get_peft_model_state_dict(model).items()}
    assert shapes == {name: value.shape for name, value in state.items()}
