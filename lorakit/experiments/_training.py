"""Trainings of several adapters on one base model, equal in everything but the adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import CalibrationError
from lorakit.experiments._losses import Evaluate, losses_of
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._record import RunRecord, SweepRun
from lorakit.experiments._settings import MAX_GRAD_NORM, TrainSettings


@dataclass(frozen=True)
class Trained:
    """The losses without an adapter, one run for every seed and config, and the settings that all runs share."""

    base: list[float]
    runs: tuple[SweepRun, ...]
    settings: dict[str, Any]


def train_each(
    model: nn.Module, configs: Mapping[str, PeftConfig], train_data: Any, evaluate: Evaluate, settings: TrainSettings
) -> Trained:
    """Train an adapter for each config and seed, evaluate each, and give the model back as it was.

    Runs that `settings.path` holds are not repeated.
    """
    record = RunRecord.open(settings.path, settings.record(model, train_data), configs)
    todo = [(name, seed) for seed in settings.seeds for name in configs if (name, seed) not in record.runs]
    with preserved_rng(model), preserved_state(model):
        if record.base is None:
            with preserved_base(model, None):
                model.eval()
                record.set_base(losses_of(model, evaluate, "the model without an adapter"))
        base = record.base or []
        total = len(todo) * settings.steps
        with tqdm(total=total, desc="trainings", unit="step", disable=not settings.progress, delay=1.0) as bar:
            for name, seed in todo:
                bar.set_postfix_str(f"{name}, seed {seed}")
                with preserved_base(model, configs[name]):
                    set_seed(seed % 2**32)
                    adapted = get_peft_model(model, copy.deepcopy(configs[name]))
                    params = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
                    what = f"{name} with seed {seed}"
                    train_loss = train_adapter(
                        adapted, batches_of(train_data, settings, seed, bar), settings, seed, what
                    )
                    adapted.eval()
                    losses = losses_of(adapted, evaluate, what, len(base))
                record.add(SweepRun(name, seed, params, tuple(losses), train_loss))
    runs = tuple(record.runs[name, seed] for seed in settings.seeds for name in configs)
    return Trained(base, runs, record.settings)


def batches_of(data: Any, settings: TrainSettings, seed: int, bar: Any) -> Iterator[Any]:
    """Batches in an order that depends on the seed alone. Before each one all generators are seeded anew."""
    generator = torch.Generator().manual_seed(seed)
    size = settings.batch_size
    sampler = RandomSampler(data, num_samples=settings.steps * (size or 1), generator=generator)
    loader = iter(DataLoader(data, size, sampler=sampler, collate_fn=settings.collate_fn, generator=generator))
    for step in range(settings.steps):
        set_seed((seed * 1_000_003 + step) % 2**32)
        yield next(loader)
        bar.update()


def train_adapter(model: Any, batches: Iterator[Any], settings: TrainSettings, seed: int, what: str) -> float | None:
    """Train; the mean training loss of the last tenth of the steps, or None if the caller's function trained."""
    model.train()
    with torch.enable_grad():
        if settings.train is not None:
            settings.train(model, batches, seed)
            return None
        losses = _minimize(model, batches, settings)
    if not bool(losses.isfinite().all()):
        step = int((~losses.isfinite()).nonzero()[0, 0])
        raise CalibrationError(
            f"The training loss of {what} is not finite from step {step} on: lower the learning rate or check the data."
        )
    return float(losses[-max(1, len(losses) // 10) :].mean())


def _minimize(model: Any, batches: Iterator[Any], settings: TrainSettings) -> Tensor:
    """AdamW, linear warm-up and cosine decay, gradients clipped to norm 1. Returns the training losses (steps,)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup, settings.steps)
    device = parameters[0].device
    losses: list[Tensor] = []
    for batch in batches:
        loss = model(**send_to_device(batch, device)).loss
        if loss is None:
            raise CalibrationError("The model returned no loss for a training batch. Give the examples labels.")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double()
