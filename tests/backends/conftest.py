"""Tiny Llamas quantized by each backend, loaded as its users load them; a backend that is absent is skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _hqq(**options: Any) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig

    return BaseQuantizeConfig(group_size=32, **options)


@dataclass(frozen=True)
class Backend:
    """`exact`: the layer computes with the dequantized weight, and does not round its inputs to few bits."""

    package: str
    dtype: torch.dtype
    quantization: Callable[[], Any]
    exact: bool = True

    @property
    def tolerance(self) -> float:
        """Of a layer's output from the formula in float64, or of two runs from each other; relative to the norm."""
        if not self.exact:
            return 2e-2
        return 1e-5 if self.dtype == torch.float32 else 1e-2

    def load(self, path: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        if self.package == "hqq":  # which transformers does not load at present
            model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).requires_grad_(False)
            return quantize_by_hqq(model, self.quantization(), self.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=self.dtype, device_map="cpu", quantization_config=self.quantization()
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # else what comes out depends on the processor
                module.support_avx512bf16_for_cpu = False
        return model


BACKENDS = {
    "bitsandbytes nf4": Backend("bitsandbytes", torch.float32, lambda: _bitsandbytes(load_in_4bit=True)),
    "bitsandbytes fp4, nested, bfloat16": Backend(
        "bitsandbytes",
        torch.bfloat16,
        lambda: _bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    ),
    "bitsandbytes int8": Backend("bitsandbytes", torch.float32, lambda: _bitsandbytes(load_in_8bit=True), exact=False),
    "bitsandbytes int8, bfloat16": Backend(
        "bitsandbytes", torch.bfloat16, lambda: _bitsandbytes(load_in_8bit=True), exact=False
    ),
    "torchao int8": Backend("torchao", torch.float32, _torchao),
    "torchao int8, bfloat16": Backend("torchao", torch.bfloat16, _torchao),
    "hqq 4 bits": Backend("hqq", torch.float32, lambda: _hqq(nbits=4)),
    "hqq 4 bits, bfloat16": Backend("hqq", torch.bfloat16, lambda: _hqq(nbits=4)),
}


def quantize_by_hqq(model: nn.Module, quantization: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from hqq.core.quantize import HQQLinear

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, HQQLinear(child, quantization, compute_dtype=dtype, device="cpu"))
    model.hqq_quantized = True  # as hqq's own loading marks it
    return model


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A Llama with biases in its attention; every side of a weight is a multiple of the backends' group sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
            attention_bias=True,
            initializer_range=0.1,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(params=BACKENDS)
def backend(request):
    chosen = BACKENDS[request.param]
    pytest.importorskip(chosen.package)
    return chosen


@pytest.fixture(scope="session")
def hqq_models() -> dict[Backend, nn.Module]:
    """Those that have been quantized: hqq takes seconds for each."""
    return {}


@pytest.fixture
def quantized(backend, files, hqq_models) -> Callable[[], nn.Module]:
    """Makes the tiny Llama as the backend quantizes it: the same at every call."""

    def make() -> nn.Module:
        if backend.package != "hqq":
            return backend.load(files)
        if backend not in hqq_models:
            hqq_models[backend] = backend.load(files)
        return copy.deepcopy(hqq_models[backend])

    return make


@pytest.fixture
def adapted(quantized, randomize) -> Callable[..., nn.Module]:
    """Puts an adapter of random values on it."""

    def make(config: Any, base: nn.Module | None = None, std: float = 0.2) -> nn.Module:
        return randomize(get_peft_model(base or quantized(), config), std=std).eval()

    return make


@pytest.fixture
def dequantize() -> Callable[[nn.Module], Tensor]:
    """The weight of a quantized layer by its backend's own function, in float64."""

    def weight_of(layer: nn.Module) -> Tensor:
        weight = getattr(layer, "weight", None)
        kind = type(weight).__name__
        if hasattr(layer, "W_q"):
            weight = layer.dequantize()
        elif kind == "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
        elif kind == "Int8Params":
            from bitsandbytes.functional import int8_vectorwise_dequant

            scale = weight.SCB if layer.state.SCB is None else layer.state.SCB
            weight = int8_vectorwise_dequant(weight.data, scale)
        else:
            assert type(weight).__module__.startswith("torchao")
            weight = weight.dequantize()
        return weight.detach().double()

    return weight_of
