"""The arguments of a comparison of methods, checked before anything is trained."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lorakit._checks import check_integer, check_number, check_seed
from lorakit.errors import EvaluationError
from lorakit.evaluation import LoadOptions, Task
from lorakit.evaluation._evaluate import tasks_of
from lorakit.experiments._compare_kinds import KINDS
from lorakit.experiments._compare_probes import FromProbe, check_probe_settings
from lorakit.experiments._settings import MAX_GRAD_NORM, TrainSettings
from lorakit.experiments._training import plain_config

OWN = ("learning_rate", "learning_rates", "from_probe", "shuffle_seed")  # keys of a method beside its config's fields


@dataclass(frozen=True)
class Method:
    """One method: its PEFT config, the learning rates to choose from, and whether a probe decides on ks or ranks."""

    name: str
    config: PeftConfig
    learning_rates: tuple[float, ...]
    probe: FromProbe | None = None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method."""
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))


@dataclass(frozen=True)
class Training:
    """How every method is trained, but for the learning rate; `steps` or `epochs` is None.

    `more` are the batch size, weight decay, schedule and whether batches are grouped by length.
    """

    steps: int | None
    epochs: float | None
    warmup_steps: int | None
    warmup_ratio: float | None
    more: Mapping[str, Any]

    def on(self, documents: int) -> dict[str, Any]:
        """The arguments of `TrainSettings` for so many documents; the default warm-up is a twentieth of the steps."""
        steps = self.steps or math.ceil((self.epochs or 0) * documents / self.more["batch_size"])
        ratio = 0.05 if self.warmup_ratio is None else self.warmup_ratio
        warmup = math.ceil(ratio * steps) if self.warmup_steps is None else self.warmup_steps
        return {**self.more, "steps": steps, "warmup_steps": warmup}

    def record(self) -> dict[str, Any]:
        """The arguments as JSON data."""
        return {
            "steps": self.steps,
            "epochs": self.epochs,
            "warmup_steps": self.warmup_steps,
            "warmup_ratio": self.warmup_ratio,
            **self.more,
        }


@dataclass(frozen=True)
class MethodsSettings:
    """The arguments of `lorakit.experiments.compare_methods`, in the form in which its trials take them.

    `validation` is 0 where nothing is tuned, and None for a tenth of the training documents.
    """

    base: str
    options: LoadOptions
    model: str
    data: Mapping[str, Any]
    methods: tuple[Method, ...]
    reference: str
    tasks: tuple[Task, ...]
    margins: Mapping[str, float]
    alpha: float
    seeds: tuple[int, ...]
    training: Training
    validation: int | None
    save_adapters: bool
    directory: Path

    def record(self) -> dict[str, Any]:
        """The settings as JSON data, for the report."""
        return {
            "base": self.base,
            "options": asdict(self.options),
            "model": self.model,
            "train": dict(self.data),
            "methods": {
                one.name: {
                    "config": plain_config(one.config),
                    "learning_rates": list(one.learning_rates),
                    "probe": None if one.probe is None else asdict(one.probe),
                }
                for one in self.methods
            },
            "reference": self.reference,
            **self.training.record(),
            "max_grad_norm": MAX_GRAD_NORM,
            "seeds": list(self.seeds),
            "margins": dict(self.margins),
            "alpha": self.alpha,
        }


def check_model(model: str) -> str:
    """The kind of model. Raises: ValueError."""
    if model not in KINDS:
        raise ValueError(f"`model` must be one of {', '.join(KINDS)}; got {model!r}.")
    return model


def check_methods(methods: Any, learning_rates: Sequence[float], model: str) -> tuple[Method, ...]:
    """Raises: ValueError, TypeError, naming the method and the field."""
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError("`methods` must map names to PEFT configs, or to mappings of their fields; got none.")
    found = {str(name): _method(str(name), given, learning_rates, model) for name, given in methods.items()}
    for name, given in methods.items():
        if isinstance(given, Mapping) and ("from_probe" in given or "shuffle_seed" in given):
            found[str(name)] = replace(found[str(name)], probe=_from_probe(str(name), methods, found))
    return tuple(found.values())


def _from_probe(name: str, given: Mapping[str, Any], methods: Mapping[str, Method]) -> FromProbe:
    """Raises: ValueError."""
    where, own = f"methods[{name!r}]", given[name]
    of, seed = own.get("from_probe"), own.get("shuffle_seed")
    if seed is not None:
        check_seed(f"{where}.shuffle_seed", seed)
    if isinstance(of, str):
        other = given.get(of)
        if not isinstance(other, Mapping) or not isinstance(other.get("from_probe"), Mapping):
            raise ValueError(f"`{where}.from_probe` must be a method with a probe of its own; got {of!r}.")
        if methods[of].peft_type != methods[name].peft_type:
            raise ValueError(f"`{where}` and {of!r}, whose probe it takes, must be of one `peft_type`.")
        settings = other["from_probe"]
    else:
        settings, of = of, name
    owner = methods[of]
    checked = check_probe_settings(where, settings, owner.config, owner.learning_rates[0])
    return FromProbe(of, checked, seed)


def _method(name: str, given: Any, learning_rates: Sequence[float], model: str) -> Method:
    where = f"methods[{name!r}]"
    if isinstance(given, PeftConfig):
        return Method(name, given, _rates(where, None, None, learning_rates))
    if not isinstance(given, Mapping):
        raise TypeError(f"`{where}` must be a PEFT config, or a mapping of its fields; got {type(given).__name__}.")
    kept = {key: value for key, value in given.items() if key not in OWN}
    rates = _rates(where, given.get("learning_rate"), given.get("learning_rates"), learning_rates)
    return Method(name, config_of(kept, where, KINDS[model].task_type), rates)


def config_of(given: Mapping[str, Any], where: str, task_type: str | None) -> PeftConfig:
    """The PEFT config of a mapping with `peft_type` (LORA by default) and fields. Raises: ValueError."""
    kind = str(given.get("peft_type", "LORA")).upper()
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if cls is None:
        known = ", ".join(sorted(map(str, PEFT_TYPE_TO_CONFIG_MAPPING)))
        raise ValueError(f"`{where}`: `peft_type` must be one of {known}; got {given.get('peft_type')!r}.")
    known_fields = [field.name for field in fields(cls) if field.init]
    for key in given:
        if key not in known_fields:
            close = difflib.get_close_matches(str(key), known_fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"`{where}` has the key {key!r}, which is no field of {cls.__name__}{hint}")
    more = {"total_step": 10**9} if kind == "ADALORA" else {}  # which a training sets to its steps
    try:
        return get_peft_config({"task_type": task_type, **more, **given, "peft_type": kind})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{where}`: {error}") from error


def check_rates(learning_rate: float | None, learning_rates: Sequence[float] | None) -> tuple[float, ...]:
    """The grid of all methods that have none of their own. Raises: ValueError."""
    return _rates("", learning_rate, learning_rates, ())


def _rates(where: str, learning_rate: Any, learning_rates: Any, default: Sequence[float]) -> tuple[float, ...]:
    label = f"{where}." if where else ""
    if learning_rate is not None and learning_rates is not None:
        raise ValueError(f"`{label}learning_rate` and `{label}learning_rates` cannot both be given.")
    if learning_rate is not None:
        return (check_number(f"{label}learning_rate", learning_rate, above=0),)
    if learning_rates is None:
        if not default and where:
            raise ValueError(f"`{where}` has no learning rate: give it one, or all methods `learning_rates`.")
        return tuple(default)
    if isinstance(learning_rates, str | float | int) or not list(learning_rates):
        raise ValueError(f"`{label}learning_rates` must be a list of numbers; got {learning_rates!r}.")
    found = tuple(sorted(check_number(f"{label}learning_rates", rate, above=0) for rate in learning_rates))
    if len(set(found)) < len(found):
        raise ValueError(f"`{label}learning_rates` must be different; got {list(found)}.")
    return found


def check_reference(reference: str | None, methods: Sequence[Method]) -> str:
    """The method that the others are compared with. Raises: ValueError."""
    names = [one.name for one in methods]
    if reference is not None and reference not in names:
        raise ValueError(f"`reference` must be one of the methods {', '.join(names)}; got {reference!r}.")
    return names[0] if reference is None else reference


def check_validation(validation: int | None, methods: Sequence[Method]) -> int | None:
    """How many documents are held out; None where the data decide. Raises: ValueError."""
    tuned = any(len(one.learning_rates) > 1 for one in methods)
    if validation is not None:
        return check_integer("validation", validation, least=int(tuned))
    return None if tuned else 0


def check_train(train: Any, model: str) -> dict[str, Any]:
    """The training data as the kind of model reads them. Raises: ValueError."""
    known = KINDS[model].data_options
    data = dict(train) if isinstance(train, Mapping) else {"source": train}
    unknown = [name for name in data if name not in known]
    if unknown or not isinstance(data.get("source"), str | os.PathLike):
        raise ValueError(
            f"`train` must be a path or the id of a dataset, or a mapping with `source` and any of "
            f"{', '.join(name for name in known if name != 'source')}; got {train!r}."
        )
    return {**data, "source": os.fspath(data["source"])}


def check_training(
    *, steps: int | None, epochs: float | None, warmup_steps: int | None, warmup_ratio: float | None, **more: Any
) -> Training:
    """The arguments of every training but the learning rate. Raises: ValueError."""
    if (steps is None) == (epochs is None):
        raise ValueError("One of `steps` and `epochs` must be given.")
    if epochs is not None:
        check_number("epochs", epochs, above=0)
    if warmup_ratio is not None:
        if warmup_steps is not None:
            raise ValueError("`warmup_steps` and `warmup_ratio` cannot both be given.")
        if not 0 <= check_number("warmup_ratio", warmup_ratio) < 1:
            raise ValueError(f"`warmup_ratio` must be in [0, 1); got {warmup_ratio!r}.")
    check_integer("batch_size", more["batch_size"])
    more["weight_decay"] = check_number("weight_decay", more["weight_decay"])
    any_steps = 1 if steps is None else steps
    TrainSettings(any_steps, learning_rate=1.0, warmup_steps=warmup_steps, collate_fn=None, train=None, **more)
    return Training(steps, epochs, warmup_steps, warmup_ratio, more)


def check_tasks(tasks: Any, margin: float | None) -> tuple[tuple[Task, ...], dict[str, float]]:
    """The tasks, and a margin for each of them or for none. Raises: EvaluationError, ValueError."""
    found = tasks_of(tasks)
    if margin is not None:
        check_number("margin", margin, above=0)
    margins = {task.name: margin if task.margin is None else task.margin for task in found}
    without = [name for name, value in margins.items() if value is None]
    if without and len(without) < len(margins):
        raise EvaluationError(f"`margin` must be given where some tasks have their own; {without[0]!r} has none.")
    return tuple(found), {name: float(value) for name, value in margins.items() if value is not None}
