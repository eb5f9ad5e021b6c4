"""The arguments of a bench, checked before anything is trained."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lorakit._checks import check_integer, check_number
from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions, Task
from lorakit.evaluation.comparison import Question
from lorakit.experiments._settings import MAX_GRAD_NORM, TrainSettings, distinct_integers
from lorakit.statistics._seeds import MIN_SEEDS

POLICIES = ("global_median", "global_p90", "per_module", "knee", "entropy")
PROBE_FIELDS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "task_type"),
)
INITS = (True, "gaussian", "orthogonal")  # those that leave the base weights alone
_FOUND_OUT = ("peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "revision", "runtime_config")
_LOADER = tuple(name for name in inspect.signature(loader).parameters if name not in ("tokenizer", "progress"))

Policy = str | int


@dataclass(frozen=True)
class BenchSettings:
    """The arguments of `lorakit.experiments.bench`, in the form in which its trials take them."""

    base: str
    options: LoadOptions
    data: Mapping[str, Any]
    probe: Mapping[str, Any]
    training: Mapping[str, Any]
    seeds: tuple[int, ...]
    policies: tuple[Policy, ...]
    retrain: bool
    cut: bool
    energy: float
    question: Question
    gate: Mapping[str, float]
    tolerance: float | None
    directory: Path

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order given."""
        return self.question.wanted

    def record(self) -> dict[str, Any]:
        """The settings as JSON data, for the report."""
        return {
            "base": self.base,
            "options": asdict(self.options),
            "train": dict(self.data),
            "probe": dict(self.probe),
            **self.training,
            "max_grad_norm": MAX_GRAD_NORM,
            "seeds": list(self.seeds),
            "policies": list(self.policies),
            "retrain": self.retrain,
            "truncate": self.cut,
            "energy": self.energy,
            "gate": dict(self.gate),
            "tolerance": self.tolerance,
            "margins": dict(self.question.margins),
            "alpha": self.question.alpha,
        }


def check_train(train: Any) -> dict[str, Any]:
    """The training data as `lorakit.data.loader` takes it. Raises: TypeError, ValueError."""
    data = dict(train) if isinstance(train, Mapping) else {"source": train}
    unknown = [name for name in data if name not in _LOADER]
    if unknown or not isinstance(data.get("source"), str | os.PathLike):
        raise ValueError(
            f"`train` must be a path or the id of a dataset, or a mapping with `source` and options of "
            f"lorakit.data.loader ({', '.join(name for name in _LOADER if name != 'source')}); got {train!r}."
        )
    if "batch_size" in data:
        raise ValueError("`train` must not have `batch_size`, which is an argument of its own.")
    return {**data, "source": os.fspath(data["source"])}


def check_probe(probe: Any) -> dict[str, Any]:
    """The fields of the probe's LoraConfig.

    Raises: TypeError for anything else than a plain LoraConfig or a mapping; ValueError for fields of other methods,
    and for what would be trained beside the adapter.
    """
    if type(probe) is LoraConfig:
        default = LoraConfig().to_dict()
        given = {k: v for k, v in probe.to_dict().items() if v != default.get(k) and k not in _FOUND_OUT}
        given["r"] = probe.r
    elif isinstance(probe, Mapping):
        given = dict(probe)
    else:
        raise TypeError(f"`probe` must be a LoraConfig, or a mapping of its fields; got {type(probe).__name__}.")
    unknown = [name for name in given if name not in PROBE_FIELDS]
    if unknown:
        raise ValueError(
            f"`probe` must be a plain LoRA, with no other fields than {', '.join(PROBE_FIELDS)}; got "
            f"{', '.join(map(repr, unknown))}."
        )
    if given.get("init_lora_weights", True) not in INITS:
        raise ValueError(
            f"`probe` must have an init_lora_weights that leaves the base model as it is, one of "
            f"{', '.join(map(repr, INITS))}; got {given['init_lora_weights']!r}."
        )
    check_integer("probe['r']", given.get("r"))
    check_number("probe['lora_alpha']", given.get("lora_alpha", 8), above=0)
    named = given.get("target_modules")
    given.setdefault("lora_alpha", 8)
    if given.setdefault("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise ValueError(f"`probe` must have the task_type 'CAUSAL_LM', or none; got {given['task_type']!r}.")
    if named is not None and not isinstance(named, str):
        given["target_modules"] = sorted(named)
    return {name: getattr(value, "value", value) for name, value in given.items()}


def check_policies(policies: Any, rank: int) -> tuple[Policy, ...]:
    """Names of suggestions, and ranks for all modules. Raises: ValueError."""
    found = (policies,) if isinstance(policies, str | int) else tuple(policies)
    for policy in found:
        if isinstance(policy, int) and not isinstance(policy, bool):
            check_integer("policies", policy, most=rank)
        elif policy not in POLICIES:
            raise ValueError(
                f"`policies` must be of {', '.join(POLICIES)}, or ranks up to the probe's {rank}; got {policy!r}."
            )
    if not found or len(set(found)) < len(found):
        raise ValueError(f"`policies` must be different, at least one; got {list(found)!r}.")
    return found


def check_seeds(seeds: Any) -> tuple[int, ...]:
    """Raises: EvaluationError for fewer seeds than an interval needs; ValueError."""
    found = distinct_integers("seeds", seeds)
    if len(found) < MIN_SEEDS:
        raise EvaluationError(
            f"`seeds` must be at least {MIN_SEEDS}, or their spread cannot be told; got {list(found)!r}."
        )
    return found


def check_training(*values: Any) -> dict[str, Any]:
    """The arguments of a training by name, with the warm-up steps that are the default. Raises: ValueError.

    `values` are steps, batch_size, learning_rate, weight_decay, warmup_steps, schedule and group_by_length.
    """
    names = ("steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "schedule", "group_by_length")
    given = dict(zip(names, values, strict=True))
    check_integer("batch_size", given["batch_size"])
    for name in ("learning_rate", "weight_decay"):
        given[name] = check_number(name, given[name])
    given["group_by_length"] = bool(given["group_by_length"])
    settings = TrainSettings(**given, collate_fn=None, train=None)
    return {**given, "warmup_steps": settings.warmup}


def check_gate(gate: float | None, margins: Mapping[str, float]) -> dict[str, float]:
    """By task, what the probe must gain over the base model; None: the task's margin."""
    if gate is not None:
        check_number("gate", gate)
    return {task: margin if gate is None else float(gate) for task, margin in margins.items()}


def question_of(tasks: Any, margin: float, alpha: float) -> Question:
    """Tasks and margins, fixed before anything is scored. Raises: as `lorakit.evaluation.certify`."""
    return Question(tasks=tasks, margin=margin, alpha=alpha)


def one_or_more(retrain: bool, cut: bool) -> None:
    """Raises: ValueError where there would be no variant."""
    if not (retrain or cut):
        raise ValueError("One of `retrain` and `truncate` must be true, or there is nothing to compare with the probe.")
