"""The trials of a rank selection: one training, stopped early if asked, and its scores on every named set."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import set_seed

from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.evaluation import Task
from lorakit.evaluation._evaluate import scored
from lorakit.experiments._methods import check_model
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._training import batches_of, train_adapter
from lorakit.experiments._work import Work, opened


@dataclass(frozen=True)
class NamedSets:
    """In-domain and shifted tasks, and after how many steps a training is compared on the shifted ones (None: never).

    A training stops when `patience` comparisons in a row were not better than the best so far.
    """

    tasks: tuple[Task, ...]
    shifted: tuple[Task, ...]
    tokenizer: Any
    stop_every: int | None = None
    patience: int = 2

    def __call__(self, model: Any) -> dict[str, dict[str, Any]]:
        """Scores of every set, by its name, as plain data."""
        return {n: s.to_dict() | {"mean": s.mean} for n, s in self.scores(model, (*self.tasks, *self.shifted)).items()}

    def scores(self, model: Any, tasks: tuple[Task, ...]) -> dict[str, Any]:
        """The scores of these tasks; the random generators stay as they are."""
        with torch.no_grad(), preserved_rng(model):
            return scored(model, list(tasks), self.tokenizer, limit=None, cache=None, weights="", progress=False)


class EarlyStopping:
    """Passes batches on, compares the model on the shifted sets between them, and keeps the best parameters."""

    def __init__(self, model: Any, sets: NamedSets) -> None:
        self.model, self.sets = model, sets
        self.best: tuple[float, int, dict[str, torch.Tensor]] | None = None

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, until the shifted sets' mean score has not risen for `patience` comparisons."""
        every, waited, step = self.sets.stop_every, 0, 0
        for step, batch in enumerate(batches):
            if every is not None and step and step % every == 0:
                waited = 0 if self._compare(step) else waited + 1
                if waited >= self.sets.patience:
                    return
            yield batch
        if every is not None:
            self._compare(step + 1)

    def restore(self) -> int | None:
        """Put the best parameters back; the number of steps that they were trained for."""
        if self.best is None:
            return None
        _, step, kept = self.best
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(kept[name])
        return step

    def _compare(self, step: int) -> bool:
        self.model.eval()
        found = self.sets.scores(self.model, self.sets.shifted)
        self.model.train()
        score = sum(one.mean for one in found.values()) / len(found)
        better = self.best is None or score > self.best[0]
        if better:
            self.best = score, step, {name: p.detach().clone() for name, p in self._trained().items()}
        return better

    def _trained(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def selection_trial(work: Work | bytes, name: str, config: PeftConfig | None, seed: int) -> dict[str, Any]:
    """Train one adapter (None: no adapter) and score it on every named set."""
    work, model = opened(work)
    sets: Any = work.evaluate
    if config is None:
        with preserved_rng(model), preserved_state(model), preserved_base(model, None):
            started = time.perf_counter()
            found = sets(model.eval())
            seconds = round(time.perf_counter() - started, 3)
            return {"params": 0, "sets": found, "train_loss": None, "steps": 0, "seconds": seconds}
    check_model(config, model)
    settings, what = work.settings, f"{name} with seed {seed}"
    bar = tqdm(total=settings.steps, desc=what, unit="step", disable=not work.progress, delay=1.0, leave=False)
    with preserved_rng(model), preserved_state(model), preserved_base(model, config), bar:
        set_seed(seed % 2**32)
        adapted = get_peft_model(model, copy.deepcopy(config))
        params = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        stopping = EarlyStopping(adapted, sets)
        started = time.perf_counter()
        batches = stopping.watch(batches_of(work.train_data, settings, seed, bar))
        train_loss = train_adapter(adapted, batches, settings, seed, what)
        seconds = time.perf_counter() - started
        steps = stopping.restore()
        found = sets(adapted.eval())
    return {
        "params": params,
        "sets": found,
        "train_loss": train_loss,
        "steps": settings.steps if steps is None else steps,
        "seconds": round(seconds, 3),
    }


def timed_trial(work: Work | bytes, config: PeftConfig) -> dict[str, Any]:
    """Seconds of one step, the second of two, so that what happens only once is not counted."""
    work, model = opened(work)
    check_model(config, model)
    settings = replace(work.settings, steps=2, warmup_steps=0)
    bar = tqdm(total=2, disable=True)
    times: list[float] = []

    def timed(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            _synchronize()
            times.append(time.perf_counter())
            yield batch
        _synchronize()
        times.append(time.perf_counter())

    with preserved_rng(model), preserved_state(model), preserved_base(model, config):
        set_seed(0)
        adapted = get_peft_model(model, copy.deepcopy(config))
        train_adapter(adapted, timed(batches_of(work.train_data, settings, 0, bar)), settings, 0, "the timed step")
    return {"seconds_per_step": times[2] - times[1]}


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
