"""The stages of a rank selection: which trainings, in one directory of records, and their scores."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import UnsupportedModelError
from lorakit.evaluation._scores import interval_of
from lorakit.experiments._plan import PlanResults, Trial, run_plan
from lorakit.experiments._preserve import check_no_adapters, preserved_base
from lorakit.experiments._select_trials import NamedSets, selection_trial
from lorakit.experiments._settings import RunSettings
from lorakit.experiments._training import plain_config
from lorakit.experiments._work import Work, name_of
from lorakit.naming.patterns import alpha_of, compact_pattern
from lorakit.naming.roles import group_of, layer_prefix, role_of
from lorakit.statistics import Interval

Ranks = Mapping[str, int]


class MissingTrainingsError(Exception):
    """Other shards have not finished; `results` says what is there."""

    def __init__(self, results: PlanResults) -> None:
        super().__init__(f"{len(results.missing)} trainings are missing")
        self.results = results


@dataclass(frozen=True)
class TargetModule:
    """A module that the template adapts; `cost` is d_in + d_out, the parameters of one unit of rank."""

    name: str
    d_in: int
    d_out: int
    bytes_each: int

    @property
    def cost(self) -> int:
        return self.d_in + self.d_out

    @property
    def role(self) -> str:
        return role_of(self.name) or group_of(self.name)

    def group(self, by: str) -> str:
        """The name of its group: its role, its layer, or its own name."""
        return {"role": self.role, "layer": layer_prefix(self.name) or self.name}.get(by, self.name)


def target_modules(model: nn.Module, template: PeftConfig) -> list[TargetModule]:
    """The modules that a LORA or SPECLORA template adapts. The model is given back as it was.

    Raises: ValueError for other templates, and for one with ranks of its own; UnsupportedModelError for other layers.
    """
    kind = getattr(template.peft_type, "value", template.peft_type)
    if not isinstance(template, LoraConfig) or kind not in ("LORA", "SPECLORA"):
        raise ValueError(f"`template` must be a LORA or SPECLORA config, whose ranks can be chosen; got {kind}.")
    if template.rank_pattern or template.alpha_pattern:
        raise ValueError("`template` must not have `rank_pattern` or `alpha_pattern`: the ranks are chosen here.")
    check_no_adapters(model)
    found = []
    with preserved_rng(model), preserved_state(model), preserved_base(model, template):
        adapted = get_peft_model(model, copy.deepcopy(template))
        for name, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                if "default" not in layer.lora_A or layer.lora_B["default"].weight.ndim != 2:
                    raise UnsupportedModelError(f"Ranks are chosen for linear modules; {name!r} is none.")
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                found.append(TargetModule(name, A.shape[1], B.shape[0], A.element_size()))
    return found


def with_ranks(template: Any, ranks: Ranks) -> Any:
    """A copy of the template with these ranks; every module keeps the template's scaling.

    The config is for PEFT and servers that read `rank_pattern`; a single rank needs no pattern.
    """
    config = copy.deepcopy(template)
    values = list(ranks.values())
    r = max(sorted(set(values)), key=values.count)
    rslora = bool(template.use_rslora)
    alphas = {name: alpha_of(template.lora_alpha, rank, template.r, rslora) for name, rank in ranks.items()}
    config.r, config.lora_alpha = r, alpha_of(template.lora_alpha, r, template.r, rslora)
    config.rank_pattern = compact_pattern(ranks, {name for name, rank in ranks.items() if rank == r})
    config.alpha_pattern = compact_pattern(alphas, {name for name, rank in ranks.items() if rank == r})
    return config


@dataclass(frozen=True)
class Arm:
    """One way to choose ranks, trained at every seed: parameters, and scores by set and seed."""

    name: str
    params: int
    sets: dict[str, list[dict[str, Any]]]
    train_loss: tuple[float | None, ...]
    steps: tuple[int, ...]
    seconds: float

    def means(self) -> dict[str, float]:
        """The mean score of each set over seeds; of a corpus metric the mean of its values."""
        return {name: sum(one["mean"] for one in found) / len(found) for name, found in self.sets.items()}


def gain(arm: Arm, reference: Arm, name: str, alpha: float) -> Interval:
    """The paired difference arm − reference on one set, over its documents and, with several seeds, over seeds.

    Raises: EvaluationError where both are not of the same documents, and for two seeds.
    """
    ours, theirs = arm.sets[name], reference.sets[name]
    first = theirs[0]
    return interval_of(
        [one["scores"] for one in theirs],
        [one["scores"] for one in ours],
        alpha,
        metric=first["metric"],
        labels=first["labels"],
    )


@dataclass(frozen=True)
class Stages:
    """Trains arms, each at every seed; an arm whose ranks were trained before is read from the records."""

    work: Work
    sets: NamedSets
    template: Any
    modules: tuple[TargetModule, ...]
    where: RunSettings
    model: nn.Module

    @property
    def costs(self) -> dict[str, int]:
        return {module.name: module.cost for module in self.modules}

    def uniform(self, rank: int) -> dict[str, int]:
        """One rank for all modules."""
        return {module.name: rank for module in self.modules}

    @cached_property
    def sent(self) -> Work | bytes:
        """The work as trials get it."""
        return self.work if self.where.executor is None else self.work.packed(self.where.executor)

    def train(self, arms: Mapping[str, Ranks | Sequence[Ranks]]) -> dict[str, Arm]:
        """Train every arm; a sequence has the ranks of each seed. Raises: MissingTrainingsError; as `run_plan`."""
        seeds = tuple(self.where.seeds)
        by_seed = {n: list(r) if isinstance(r, Sequence) else [r] * len(seeds) for n, r in arms.items()}
        trials = {
            (name, seed): self._trial(ranks, seed)
            for i, seed in enumerate(seeds)
            for name, found in by_seed.items()
            for ranks in [found[i]]
        }
        plan = {trial.key: trial for trial in trials.values()}
        results = self.run(list(plan.values()))
        found = {name: [results[trials[name, seed].key] for seed in seeds] for name in arms}
        return {name: _arm(name, rows) for name, rows in found.items()}

    def without_adapter(self) -> Arm:
        """The base model on every set; it shows what is wrong with a task before anything is trained."""
        arguments = {"work": self.sent, "name": "without adapter", "config": None, "seed": 0}
        trial = Trial("without adapter", selection_trial, arguments, name_of(self.work.model) | self._scored)
        return _arm("without adapter", [self.run([trial], whole=True)[trial.key]])

    def run(self, trials: Sequence[Trial], *, whole: bool = False) -> PlanResults:
        """Run a stage's trials, or this shard's part of them."""
        where = self.where
        assert where.records is not None
        shard = None if whole else where.shard
        found = run_plan(trials, where.records, executor=where.executor, shard=shard, progress=where.progress)
        if found.missing:
            raise MissingTrainingsError(found)
        return found

    def _trial(self, ranks: Ranks, seed: int) -> Trial:
        name, config = label_of(ranks), with_ranks(self.template, ranks)
        shared = name_of(self.work.model) | self.work.settings.record(self.work.train_data) | self._scored
        return Trial(
            key=f"{name} with seed {seed}",
            function=selection_trial,
            arguments={"work": self.sent, "name": name, "config": config, "seed": seed},
            settings=shared | {"seed": seed, "config": plain_config(config)},
        )

    @cached_property
    def _scored(self) -> dict[str, Any]:
        """What records say about the sets: names, and hashes of the data of tasks that have one."""
        named = {"tasks": self.sets.tasks, "shifted": self.sets.shifted}
        return {
            key: {task.name: task.fingerprint() if task.cacheable else None for task in tasks}
            for key, tasks in named.items()
        } | {"stop_every": self.sets.stop_every, "patience": self.sets.patience}


def label_of(ranks: Ranks) -> str:
    """A name that only these ranks have: "rank 8", or a hash of each module's."""
    values = set(ranks.values())
    if len(values) == 1:
        return f"rank {values.pop()}"
    return f"ranks {hashlib.sha256(json.dumps(dict(ranks), sort_keys=True).encode()).hexdigest()[:12]}"


def _arm(name: str, rows: Sequence[Mapping[str, Any]]) -> Arm:
    sets = {task: [row["sets"][task] for row in rows] for task in rows[0]["sets"]}
    return Arm(
        name,
        max(row["params"] for row in rows),
        sets,
        tuple(row["train_loss"] for row in rows),
        tuple(row["steps"] for row in rows),
        sum(row["seconds"] for row in rows),
    )
