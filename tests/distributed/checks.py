"""Shared by the worker files: tiny models, and a runner that writes the outcomes of checks to a file."""

from __future__ import annotations

import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import FisherLoRAConfig, SpecLoRAConfig

DIRECTORY = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()

CONFIGS = {
    "hadamard": lambda: SpecLoRAConfig(r=3, lora_alpha=6, k=7, target_modules="all-linear", task_type="CAUSAL_LM"),
    "svd": lambda: SpecLoRAConfig(
        r=3, lora_alpha=6, k=7, mode="svd", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "fisherlora": lambda: FisherLoRAConfig(r=5, r_q=2, task_type="CAUSAL_LM"),
}


def tiny_llama(**changes: int) -> nn.Module:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # so that what the mask rescales matters
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def adapted(config: object, std: float = 0.1) -> PeftModel:
    """A tiny Llama with an adapter of random values, the same in every process."""
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def token_ids(n: int, length: int = 7) -> Tensor:
    return torch.randint(1, 64, (n, length), generator=torch.Generator().manual_seed(3))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def run(checks: dict[str, Callable[[], None]]) -> None:
    """Run the checks in turn, in all processes together; stop at the first that fails in any of them."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    outcomes: dict[str, str] = {}
    failed = False
    for name, check in checks.items():
        try:
            check()
            dist.barrier()
            outcomes[name] = "ok"
        except Exception:
            outcomes[name] = traceback.format_exc()[-3000:]
            failed = True
        (DIRECTORY / f"{Path(sys.argv[0]).stem}-{rank}.json").write_text(json.dumps(outcomes))
        if failed:
            sys.exit(1)
    dist.destroy_process_group()
