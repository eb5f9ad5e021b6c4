"""The demo's trainings: four adapters on the same passages in the same order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm

from lorakit._format import count
from lorakit.adapters.in_model import live_modules
from lorakit.demo._settings import DemoSettings
from lorakit.naming.roles import role_of
from lorakit.spectral import capacity_utilization
from lorakit.tuners.fisherlora import FisherLoRAConfig
from lorakit.tuners.speclora import SpecLoRAConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTED_ROLES = ("query", "value", "output", "down")
LORA, OTHER_SEED, FISHERLORA, SPECLORA = "LoRA", "LoRA, seed+1", "FisherLoRA", "SpecLoRA"


@dataclass(frozen=True)
class Trained:
    """What came of a training. `losses` are those of the steps; `seconds_per_step` is their median."""

    method: str
    parameters: int
    losses: tuple[float, ...]
    seconds_per_step: float
    utilization_q: float | None
    utilization_v: float | None

    @property
    def line(self) -> str:
        """The result in a line."""
        return (
            f"{self.method}: {count(self.parameters)} parameters, loss {self.losses[0]:.3f} → {self.losses[-1]:.3f}, "
            f"{self.seconds_per_step:.2f} s a step"
        )


def train(
    base: PreTrainedModel, method: str, batches: Sequence[Tensor], settings: DemoSettings
) -> tuple[PeftModel, Trained]:
    """Train one method on the base model, in place: AdamW at a constant learning rate after three warm-up steps."""
    torch.manual_seed(settings.seed + (method == OTHER_SEED))
    model = get_peft_model(base, _config(method, base, settings))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=3)
    model.train()
    losses, seconds = [], []
    for ids in tqdm(batches, desc=f"training {method}", unit="step", leave=False):
        started = time.perf_counter()
        ids = ids.to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    model.eval()
    return model, Trained(
        method=method,
        parameters=model.get_nb_trainable_parameters()[0],
        losses=tuple(losses),
        seconds_per_step=statistics.median(seconds[len(seconds) // 8 :]),
        utilization_q=_utilization(model, "query"),
        utilization_v=_utilization(model, "value"),
    )


def _config(method: str, base: PreTrainedModel, settings: DemoSettings) -> LoraConfig:
    names = [name for name, _ in base.named_modules()]
    shared: dict[str, Any] = {
        "r": settings.r,
        "lora_alpha": 2 * settings.r,
        "target_modules": sorted({name.rpartition(".")[2] for name in names if role_of(name) in ADAPTED_ROLES}),
        "task_type": "CAUSAL_LM",
    }
    if method == FISHERLORA:
        return FisherLoRAConfig(**shared)
    if method == SPECLORA:
        return SpecLoRAConfig(**shared, k=settings.k)
    return LoraConfig(**shared)


def _utilization(model: PeftModel, role: str) -> float | None:
    """Mean capacity utilization of the modules of one role."""
    values = [
        float(capacity_utilization(module.factors().singular_values(), module.rank))
        for module in live_modules(model, model.active_adapter)
        if module.role == role
    ]
    return statistics.fmean(values) if values else None
