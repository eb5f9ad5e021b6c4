"""The trials of a bench: what each is called, where it writes, and what its record depends on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.evaluation import Task
from lorakit.evaluation._digests import data_digest
from lorakit.experiments import _bench_trials as trials
from lorakit.experiments._bench_ranks import BenchRanks
from lorakit.experiments._bench_settings import BenchSettings
from lorakit.experiments._plan import Trial

DATA_KEY = "training data"


@dataclass(frozen=True)
class BenchAdapter:
    """An adapter of a bench: its name, where it is, and the hash of its weights."""

    name: str
    path: str
    record: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return str(self.record["sha256"])


class BenchPlan:
    """Makes the trials of a bench."""

    def __init__(self, settings: BenchSettings, *, progress: bool) -> None:
        self._settings = settings
        self._progress = progress
        self.data_sha256 = data_digest(settings.data["source"])
        self.fingerprints = {task.name: task.fingerprint() for task in settings.tasks}

    def _trial(self, key: str, function: Any, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> Trial:
        shared = {"base": self._settings.base, "options": self._settings.options}
        stated = {**settings, "base": self._settings.base, "options": asdict(self._settings.options)}
        return Trial(key, function, {**shared, **arguments}, stated)

    def read_data(self) -> Trial:
        data = self._settings.data
        return self._trial(DATA_KEY, trials.read_data, {"data": data}, self._data_settings)

    @property
    def _data_settings(self) -> dict[str, Any]:
        return {"train": dict(self._settings.data), "train_sha256": self.data_sha256}

    def train(self, name: str, seed: int, config: Mapping[str, Any]) -> tuple[str, Trial]:
        full, training = f"{name}, seed {seed}", self._settings.training
        path = self._path(full)
        arguments = {"data": self._settings.data, "config": config, "training": training, "seed": seed}
        stated = {"config": config, "training": training, "seed": seed, **self._data_settings}
        trial = self._trial(full, trials.train, {**arguments, "out": path, "progress": self._progress}, stated)
        return path, trial

    def cut(self, ranks: BenchRanks, seed: int, probe: BenchAdapter) -> tuple[str, Trial]:
        full = f"{ranks.label} truncated, seed {seed}"
        path, by_module = self._path(full), ranks.suggestion.ranks
        arguments = {"adapter": probe.path, "sha256": probe.sha256, "ranks": by_module, "out": path}
        return path, Trial(full, trials.cut, arguments, {"probe_sha256": probe.sha256, "ranks": by_module})

    def _path(self, name: str) -> str:
        return os.fspath(self._settings.directory / "adapters" / re.sub(r"[^\w.-]+", "-", name))

    def score(self, adapter: BenchAdapter | None, task: Task) -> Trial:
        sha256 = None if adapter is None else adapter.sha256
        stated = {"task": task.name, "task_sha256": self.fingerprints[task.name], "adapter_sha256": sha256}
        path = None if adapter is None else adapter.path
        arguments = {"adapter": path, "sha256": sha256, "task": task, "progress": self._progress}
        return self._trial(score_key(adapter, task), trials.score, arguments, stated)


def plain_config(ranks: BenchRanks, probe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the LoraConfig that trains at these ranks, as JSON data."""
    kept = {name: probe[name] for name in ("lora_dropout", "init_lora_weights", "task_type") if name in probe}
    config = ranks.suggestion.to_config(**kept)
    decided = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    fields = {name: getattr(config, name) for name in decided}
    return {**fields, "target_modules": sorted(ranks.suggestion.ranks), **kept}


def score_key(adapter: BenchAdapter | None, task: Task) -> str:
    return f"{task.name} of {'the base model' if adapter is None else adapter.name}"
