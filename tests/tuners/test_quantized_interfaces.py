"""Both tuners over quantized layers whose backends need a GPU: packages of the same names in `fake_backends`, each with
a layer that looks to PEFT as the real one does, and that says what weight it computes with. PEFT's own checks find the
packages, and its own dispatchers build the layers."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, import_utils
from torch import Tensor, nn

import lorakit
from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.tuners import _layers
from lorakit.tuners.speclora import SpecLoRALayer

PACKAGES = Path(__file__).parent / "fake_backends"
K = 5


@dataclass(frozen=True)
class Backend:
    module: str
    layer: str
    peft_layer: str
    dtype: torch.dtype = torch.float32


QLINEAR = "gptqmodel.nn_modules.qlinear"
HELPERS = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
BACKENDS = {
    "gptq": Backend(QLINEAR, "BaseQuantLinear", "GPTQLoraLinear"),
    "awq": Backend(QLINEAR, "AwqQuantLinear", "AwqLoraLinear"),
    "eetq": Backend("eetq", "EetqLinear", "EetqLoraLinear", torch.float16),
    "aqlm": Backend("aqlm", "QuantizedLinear", "AqlmLoraLinear", torch.bfloat16),
    "inc": Backend(HELPERS, "PatchedLinear", "IncLoraLinear"),
}


class Attention(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.v_proj = (layer(nn.Linear(16, 8)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(2.0))  # PEFT takes the device from the first parameter of a model

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.v_proj(x) * self.scale


@pytest.fixture
def packages(monkeypatch) -> Iterator[None]:
    """The fake packages installed, and nothing left of them afterwards."""
    checks = [import_utils.is_gptqmodel_available, import_utils.is_optimum_available, import_utils.is_aqlm_available]
    checks += [import_utils.is_eetq_available, import_utils.is_inc_available]
    modules = [importlib.import_module(f"peft.tuners.lora.{name}") for name in ("eetq", "aqlm", "inc")]
    contents = [dict(vars(module)) for module in modules]
    loaded, made = dict(sys.modules), dict(_layers._CLASSES)
    monkeypatch.syspath_prepend(PACKAGES)
    _refresh(checks, modules)
    yield
    for module, content in zip(modules, contents, strict=True):
        vars(module).clear()
        vars(module).update(content)
    for name in sys.modules.keys() - loaded.keys():
        if name.partition(".")[0] in {"gptqmodel", "optimum", "eetq", "aqlm", "neural_compressor"}:
            del sys.modules[name]
    _layers._CLASSES.clear()
    _layers._CLASSES.update(made)
    monkeypatch.undo()
    _refresh(checks, [])


def _refresh(checks: list, modules: list[ModuleType]) -> None:
    importlib.invalidate_caches()
    for check in checks:
        check.cache_clear()
    for module in modules:  # they look for their backend, and define their layer, as they are imported
        importlib.reload(module)


@pytest.fixture(params=BACKENDS)
def backend(request, packages) -> Backend:
    return BACKENDS[request.param]


def quantized_model(backend: Backend) -> nn.Module:
    torch.manual_seed(0)
    return Attention(getattr(importlib.import_module(backend.module), backend.layer))


@pytest.fixture
def make(backend, randomize):
    """Makes the model under an adapter, always with the same quantized weights."""

    def adapted(config: LoraConfig | None, *, fill: bool = True) -> nn.Module:
        base = quantized_model(backend)
        if config is None:
            return base
        model = get_peft_model(base, config)
        return randomize(model, std=0.5) if fill else model

    return adapted


def spec(**options: object) -> SpecLoRAConfig:
    return SpecLoRAConfig(**{"r": 2, "lora_alpha": 3, "k": K, "target_modules": ["q_proj", "v_proj"]} | options)


def layers_of(model: PeftModel) -> list:
    return [model.base_model.model.q_proj, model.base_model.model.v_proj]


def example(backend: Backend) -> Tensor:
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(4)).to(backend.dtype)


def expected_weight(layer: nn.Module, adapter: str = "default") -> Tensor:
    """Γ ⊙ W + scaling · B A in float64; in the svd mode Eq. 4-6."""
    W = layer.get_base_layer().hidden_weight().detach().double()
    A, B = (factors[adapter].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
    if isinstance(layer, SpecLoRALayer):
        mask = layer.lora_spec[adapter]
        d, k = 1 + mask.weight.detach().double(), mask.k
        if mask.mode == "svd":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            U[:k, :k] *= d[:, None]
            W = U @ torch.diag(S) @ Vh
        else:
            gamma = torch.ones_like(W)
            block = slice(0, k) if mask.mode == "hadamard" else slice(-k, None)
            gamma[block, block] = d[:, None]
            W = gamma * W
    return W + layer.scaling[adapter] * B @ A


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-2) -> None:
    """Relative to the norm; the kernels compute in half precision."""
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("mode", ["hadamard", "hadamard_bottom", "svd"])
def test_output_and_gradients_are_those_of_the_formula(backend, make, mode):
    model, x = make(spec(mode=mode)), example(backend)
    for layer in layers_of(model):
        assert backend.peft_layer in [cls.__name__ for cls in type(layer).__mro__]
        assert isinstance(layer, SpecLoRALayer)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        assert y.dtype == backend.dtype
        bias = layer.get_base_layer().bias
        assert bias is not None
        assert_near(y, x.double() @ expected_weight(layer).T + bias.double())
        upstream = torch.randn_like(y)
        (y * upstream).sum().backward()
        assert_near(inputs.grad, upstream.double() @ expected_weight(layer))
        mask = layer.lora_spec["default"]
        rows = upstream.double()[..., -K:] if mode == "hadamard_bottom" else upstream.double()[..., :K]
        columns = {"hadamard": slice(0, K), "hadamard_bottom": slice(-K, None), "svd": slice(None)}[mode]
        projected = x.double()[..., columns] @ mask.block.double().T
        assert_near(mask.weight.grad, (rows * projected).sum((0, 1)))


@pytest.mark.parametrize("mode", ["hadamard", "hadamard_bottom"])
def test_the_block_is_that_of_the_hidden_weight_and_the_layer_is_left_as_it_was(backend, make, mode):
    untouched = make(None)
    x = example(backend)
    model = make(spec(mode=mode), fill=False)
    for name, layer in zip(("q_proj", "v_proj"), layers_of(model), strict=True):
        W, block = layer.get_base_layer().hidden_weight(), layer.lora_spec["default"].block
        assert block.shape == (K, K)
        expected = W[:K, :K] if mode == "hadamard" else W[-K:, -K:]
        torch.testing.assert_close(block.double(), expected.double(), rtol=2**-10, atol=1e-5)
        before, after = untouched.get_submodule(name).state_dict(), layer.get_base_layer().state_dict()
        assert before.keys() <= after.keys()
        assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert_near(model(x), untouched(x))


def test_the_block_where_there_is_no_bias_to_tell_the_kernel_s_dtype(backend):
    base = quantized_model(backend)
    base.q_proj.bias = base.v_proj.bias = None
    for layer in layers_of(get_peft_model(base, spec())):
        W = layer.get_base_layer().hidden_weight()
        assert layer.get_base_layer().bias is None
        torch.testing.assert_close(
            layer.lora_spec["default"].block.double(), W[:K, :K].double(), rtol=2**-10, atol=1e-5
        )


def test_two_training_steps(backend, make):
    model, x = make(spec()).train(), example(backend)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(x).float().pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize("config", [spec(), spec(mode="svd"), FisherLoRAConfig(r=4, r_q=2)], ids=lambda c: c.peft_type)
def test_saving_loading_and_copying(backend, make, tmp_path, config):
    model, x = make(config), example(backend)
    model.save_pretrained(tmp_path)
    assert_near(PeftModel.from_pretrained(make(None), tmp_path)(x), model(x))
    assert_near(copy.deepcopy(model)(x), model(x))
    if backend.module == QLINEAR:  # with the others PEFT leaves LoRA's factors on the meta device, or rounds them
        loaded = PeftModel.from_pretrained(make(None), tmp_path, low_cpu_mem_usage=True)
        assert_near(loaded(x), model(x))


def test_merging_is_refused_as_lora_s_is_and_leaves_the_layer_as_it_was(backend, make):
    plain, model, x = make(LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), make(spec()), example(backend)
    expected = model(x)
    blocks = [layer.lora_spec["default"].block.clone() for layer in layers_of(model)]
    for act in ("merge_adapter", "merge_and_unload", "unmerge_adapter"):
        outcomes = []
        for adapted in (plain, model):
            try:
                getattr(adapted, act)()
                outcomes.append(None)
            except (AttributeError, NotImplementedError, ValueError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] is not None or act == "unmerge_adapter"
        for layer, block in zip(layers_of(model), blocks, strict=True):
            assert not layer.merged
            assert torch.equal(layer.lora_spec["default"].block, block)
        assert_near(model(x), expected)


def test_an_export_is_a_plain_lora_with_the_same_output(backend, make, tmp_path):
    model, x = make(spec()), example(backend)
    assert lorakit.export.to_lora(model, tmp_path).r == 2 + K
    plain = PeftModel.from_pretrained(make(None), tmp_path)
    assert plain.peft_config["default"].peft_type == "LORA"
    assert_near(plain(x), model(x), 2e-2)


def test_fisherlora_gives_ranks_by_role(backend, make):
    model, x = make(FisherLoRAConfig(r=4, r_q=2)), example(backend)
    q_proj, v_proj = layers_of(model)
    assert (q_proj.r["default"], v_proj.r["default"]) == (2, 4)
    for layer in (q_proj, v_proj):
        assert type(layer).__name__ == backend.peft_layer
        assert_near(layer(x), x.double() @ expected_weight(layer).T + layer.get_base_layer().bias.double())


@pytest.mark.slow
def test_unpickling_finds_the_classes_in_a_process_that_has_made_none(packages, randomize, tmp_path, run_python):
    pickled = {}
    backends = {name: backend for name, backend in BACKENDS.items() if name != "inc"}  # torch unpickles no float8
    for name, backend in backends.items():
        model, x = randomize(get_peft_model(quantized_model(backend), spec())), example(backend)
        layer = layers_of(model)[0]
        pickled[name] = pickle.dumps((type(layer).__name__, layer, x, layer(x)))
    (tmp_path / "layers.pickle").write_bytes(pickle.dumps(pickled))
    done = run_python(
        f"""
        import pickle, peft, torch
        with open({str(tmp_path / "layers.pickle")!r}, "rb") as file:
            pickled = pickle.load(file)
        for name, data in pickled.items():
            class_name, layer, x, expected = pickle.loads(data)
            assert (layer(x) - expected).norm() <= 1e-2 * expected.norm()
            assert (type(layer).__module__, type(layer).__name__) == ("lorakit.tuners.speclora", class_name)
            print(class_name)
        """,
        PYTHONPATH=str(PACKAGES),
    )
    assert done.stdout.split() == [f"SpecLoRA{backend.peft_layer}" for backend in backends.values()]
