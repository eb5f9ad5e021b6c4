"""Trainings of several adapters on one base model, equal in everything but the adapter."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import CalibrationError
from lorakit.experiments._losses import losses_of
from lorakit.experiments._methods import after_step, check_batch, check_model, loss_terms, prepared, removed_parameters
from lorakit.experiments._plan import PlanResults, Trial, in_shard, run_plan
from lorakit.experiments._preserve import check_no_adapters, preserved_base
from lorakit.experiments._settings import MAX_GRAD_NORM, RunSettings, TrainSettings
from lorakit.experiments._work import Work, name_of, opened

# Fields that PEFT fills in when it meets a model, or that say nothing about the training.
_INCIDENTAL = ("base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode", "revision")
_BASE = "without adapter"


@dataclass(frozen=True)
class SweepRun:
    """One training: the held-out losses of the examples afterwards.

    `params` are the parameters that were trained, without those of directions that AdaLoRA has removed. `train_loss` is
    the mean training loss of the last tenth of the steps; None if the caller's function trained.
    """

    name: str
    seed: int
    params: int
    losses: tuple[float, ...]
    train_loss: float | None


@dataclass(frozen=True)
class Trained:
    """The losses without an adapter, one run for every seed and config, and the settings that all runs share."""

    base: list[float]
    runs: tuple[SweepRun, ...]
    settings: dict[str, Any]


def train_each(work: Work, configs: Mapping[str, PeftConfig], where: RunSettings) -> Trained | PlanResults:
    """Train an adapter for each config and seed and evaluate each; a model in this process is given back as it was.

    One trial evaluates the model without an adapter; it runs first. Returns the plan's results instead if `where` has a
    shard.
    """
    if isinstance(work.model, nn.Module):
        check_no_adapters(work.model)
    steps, own_loop = work.settings.steps, work.settings.train is not None
    configs = {name: prepared(name, config, steps, own_loop=own_loop) for name, config in configs.items()}
    identity, shared = name_of(work.model), work.settings.record(work.train_data)
    sent = work.here() if where.executor is None else work.packed(where.executor)
    base = Trial(_BASE, base_trial, {"work": sent}, identity)
    trials = [base] + [
        Trial(
            key=_key(name, seed),
            function=train_trial,
            arguments={"work": sent, "name": name, "config": config, "seed": seed},
            settings=identity | shared | {"seed": seed, "config": plain_config(config)},
        )
        for seed in where.seeds
        for name, config in configs.items()
    ]
    with contextlib.ExitStack() as stack:
        directory = where.records or stack.enter_context(tempfile.TemporaryDirectory())
        run = partial(run_plan, directory=directory, executor=where.executor)
        if base in in_shard(trials, where.shard):  # what is wrong with `model` or `evaluate` shows before any training
            count = len(run([base], progress=False)[_BASE]["losses"])
            trials = [base, *(replace(trial, arguments={**trial.arguments, "count": count}) for trial in trials[1:])]
        results = run(trials, shard=where.shard, progress=where.progress)
    if where.shard is not None:
        return results
    runs = tuple(_run(results[_key(name, seed)], name, seed) for seed in where.seeds for name in configs)
    losses = results[_BASE]["losses"]
    for one in runs:
        if len(one.losses) != len(losses):
            raise CalibrationError(
                f"`evaluate` must return the losses of the same examples each time; for {_key(one.name, one.seed)} it "
                f"returned {len(one.losses)}, without an adapter {len(losses)}."
            )
    named = {key: results[_BASE][key] for key in ("model", "model_params")}
    return Trained(losses, runs, named | shared)


def base_trial(work: Work | bytes) -> dict[str, Any]:
    """The losses without an adapter, and what model that was."""
    work, model = opened(work)
    with preserved_rng(model), preserved_state(model), preserved_base(model, None):
        model.eval()
        losses = losses_of(model, work.evaluate, "the model without an adapter")
    params = sum(parameter.numel() for parameter in model.parameters())
    return {"model": type(model).__name__, "model_params": params, "losses": losses}


def train_trial(
    work: Work | bytes, name: str, config: PeftConfig, seed: int, count: int | None = None
) -> dict[str, Any]:
    """Train one adapter and evaluate it, on `count` examples if given."""
    work, model = opened(work)
    check_model(config, model)
    settings = work.settings
    what = _key(name, seed)
    bar = tqdm(total=settings.steps, desc=what, unit="step", disable=not work.progress, delay=1.0, leave=False)
    with preserved_rng(model), preserved_state(model), preserved_base(model, config), bar:
        set_seed(seed % 2**32)
        adapted = get_peft_model(model, copy.deepcopy(config))
        params = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        batches = batches_of(work.train_data, settings, seed, bar)
        train_loss = train_adapter(adapted, batches, settings, seed, what)
        adapted.eval()
        losses = losses_of(adapted, work.evaluate, what, count)
        params -= sum(removed_parameters(adapted, used) for used in adapted.peft_config.values())
    return {"params": params, "losses": losses, "train_loss": train_loss}


def _key(name: str, seed: int) -> str:
    return f"{name} with seed {seed}"


def _run(result: Mapping[str, Any], name: str, seed: int) -> SweepRun:
    return SweepRun(name, seed, result["params"], tuple(result["losses"]), result["train_loss"])


def batches_of(data: Any, settings: TrainSettings, seed: int, bar: Any) -> Iterator[Any]:
    """Batches in an order that depends on the seed alone. Before each one all generators are seeded anew."""
    generator = torch.Generator().manual_seed(seed)
    size = settings.batch_size
    if settings.group_by_length and size is not None:
        order = _grouped(data, size, settings.steps, generator)
        loader: Any = DataLoader(data, batch_sampler=order, collate_fn=settings.collate_fn, generator=generator)
    else:
        sampler = RandomSampler(data, num_samples=settings.steps * (size or 1), generator=generator)
        loader = DataLoader(data, size, sampler=sampler, collate_fn=settings.collate_fn, generator=generator)
    loader = iter(loader)
    for step in range(settings.steps):
        set_seed((seed * 1_000_003 + step) % 2**32)
        yield next(loader)
        bar.update()


def _grouped(data: Any, size: int, steps: int, generator: torch.Generator) -> list[list[int]]:
    """The places of each batch's examples, of similar length; epoch after epoch, in random order."""
    try:
        lengths = [len(example["input_ids"]) for example in data]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            "`group_by_length` needs examples that are mappings with `input_ids`, whose length counts; leave it out "
            "for other data."
        ) from error
    batches: list[list[int]] = []
    while len(batches) < steps:
        places = get_length_grouped_indices(lengths, size, generator=generator)
        epoch = [places[start : start + size] for start in range(0, len(places), size)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[:steps]


def train_adapter(model: Any, batches: Iterator[Any], settings: TrainSettings, seed: int, what: str) -> float | None:
    """Train; the mean training loss of the last tenth of the steps, or None if the caller's function trained."""
    model.train()
    with torch.enable_grad():
        if settings.train is not None:
            settings.train(model, batches, seed)
            return None
        losses = _minimize(model, batches, settings, what)
    if not bool(losses.isfinite().all()):
        step = int((~losses.isfinite()).nonzero()[0, 0])
        raise CalibrationError(
            f"The training loss of {what} is not finite from step {step} on: lower the learning rate or check the data."
        )
    return float(losses[-max(1, len(losses) // 10) :].mean())


def _minimize(model: Any, batches: Iterator[Any], settings: TrainSettings, what: str) -> Tensor:
    """AdamW, linear warm-up and the schedule, gradients clipped to norm 1. Returns the training losses (steps,)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise CalibrationError(f"{what} has no parameters to train: check its config, such as `inference_mode`.")
    config = next(iter(getattr(model, "peft_config", {}).values()), None)  # None: the model itself is trained
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    kind = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    schedule = get_scheduler(kind, optimizer, settings.warmup, settings.steps)
    device = parameters[0].device
    losses: list[Tensor] = []
    for step, batch in enumerate(batches, start=1):
        if config is not None:
            check_batch(config, batch)
        if not hasattr(batch, "keys"):
            raise CalibrationError(
                f"`train_data` must give mappings for model(**batch); got {type(batch).__name__}. Tokenize the "
                f"examples, or let `collate_fn` do it."
            )
        loss = torch.zeros((), device=device)
        for part, share in micro_batches(batch, settings.micro_batch_size):
            part_loss = model(**send_to_device(part, device)).loss
            if part_loss is None:
                raise CalibrationError("The model returned no loss for a training batch. Give the examples labels.")
            total = part_loss if config is None else loss_terms(model, config, part_loss)
            (total if share == 1 else share * total).backward()
            loss = loss + share * part_loss.detach()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        if config is not None:
            after_step(model, step)
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
    return torch.stack(losses).double()


def micro_batches(batch: Any, size: int | None) -> list[tuple[Any, float]]:
    """A batch in parts of at most `size` examples, without padding on the right that a part does not need.

    The share of each in the batch's mean loss: of its labelled tokens, or where labels are of examples of these.
    """
    if size is None or len(batch["labels"]) <= size:
        return [(batch, 1.0)]
    cut = {name: value.split(size) for name, value in batch.items()}
    parts = [{name: values[i] for name, values in cut.items()} for i in range(len(cut["labels"]))]
    counts = [_labelled(part["labels"]) for part in parts]
    return [(_trimmed(part), n / sum(counts)) for part, n in zip(parts, counts, strict=True) if n]


def _labelled(labels: Tensor) -> int:
    """Labelled tokens, of which a causal model predicts all but the first; or examples."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum()) if labels.ndim == 2 else len(labels)


def _trimmed(part: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = part.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return part
    length = int(mask.any(0).nonzero()[-1]) + 1
    return {name: value[:, :length] if value.shape[:2] == mask.shape else value for name, value in part.items()}


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """A config as JSON gives it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, Enum):
            return value.value
        return vars(value) if hasattr(value, "__dict__") else str(value)

    kept = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    found: dict[str, Any] = json.loads(json.dumps(kept, default=plain, sort_keys=True))
    return found
