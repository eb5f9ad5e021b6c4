"""Tiny models of experts of three layouts, and adapters of them made by PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.numpy import load_file
from torch import Tensor, nn

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=4))


def _qwen3() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    special = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE, **special))


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2))


FAMILIES: dict[str, Callable[[], nn.Module]] = {"mixtral": _mixtral, "qwen3": _qwen3, "gpt-oss": _gpt_oss}


@pytest.fixture(params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    """A model with experts stacked in parameters; gpt-oss stores them input first."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return FAMILIES[request.param]().eval()


@pytest.fixture
def mixtral() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return _mixtral().eval()


def adapted(base: nn.Module, *, seed: int = 2, **changes: Any) -> PeftModel:
    """A copy of `base` with a random adapter of its experts and its queries."""
    settings: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": TARGETS,
        "rank_pattern": {"experts.down_proj": 2},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings | changes))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(model: PeftModel, directory: Path) -> str:
    model.save_pretrained(str(directory))
    return str(directory)


def loaded(base: nn.Module, directory: str | Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(directory)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(24).reshape(2, 12) % 64).logits
    return result


def dense(directory: str, path: str, experts: int, scaling: float) -> np.ndarray:
    """Each expert's ΔW (experts, d_out, d_in), in float64, from the file."""
    tensors = load_file(f"{directory}/adapter_model.safetensors")
    A = tensors[f"base_model.model.{path}.lora_A.weight"].astype(np.float64)
    B = tensors[f"base_model.model.{path}.lora_B.weight"].astype(np.float64)
    r = len(A) // experts
    return np.stack([scaling * B[:, e::experts] @ A[e * r : (e + 1) * r] for e in range(experts)])


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """PEFT's layers of parameters, by path."""
    found = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    return {name: layer for name, layer in found.items() if isinstance(layer, ParamWrapper)}
