"""The arguments that `select_ranks` and `marginal_gains` share, checked where they enter."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lorakit._checks import check_integer
from lorakit.cost import accounting
from lorakit.data import loader
from lorakit.data._sources import is_source
from lorakit.errors import EvaluationError, LorakitError
from lorakit.evaluation._evaluate import tasks_of
from lorakit.evaluation._models import load_tokenizer
from lorakit.experiments._plan import Trial
from lorakit.experiments._select_plan import Stages, target_modules, with_ranks
from lorakit.experiments._select_trials import NamedSets, timed_trial
from lorakit.experiments._settings import RunSettings, TrainSettings, check_data
from lorakit.experiments._training import plain_config
from lorakit.experiments._work import Work, check_source, model_of, name_of


@dataclass(frozen=True)
class CostEstimate:
    """What a plan of trainings takes: `seconds_per_step` is one timed step at the largest rank, after a first one.

    `scoring_seconds` is one evaluation of every set. `seconds` assumes one training at a time and no early stopping.
    `memory_bytes` is the total of `lorakit.cost.accounting` at the largest rank; None where that cannot count a model.
    """

    trainings: int
    steps: int
    seconds_per_step: float
    scoring_seconds: float
    memory_bytes: int | None

    @property
    def seconds(self) -> float:
        """Of all trainings and their scores."""
        return self.trainings * (self.steps * self.seconds_per_step + self.scoring_seconds)

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**20:.0f} MiB"
        return (
            f"at most {self.trainings} trainings of {self.steps} steps, about {self.seconds / 60:.1f} minutes{memory}"
        )


@dataclass(frozen=True)
class SetOptions:
    """What trainings are scored on, as `select_ranks` is given it."""

    tasks: Any
    shifted: Any
    tokenizer: Any
    stop_every: int | None
    patience: int

    def named(self, tokenizer: Any) -> NamedSets:
        """The tasks. Raises: ValueError, TypeError, EvaluationError."""
        within = tuple(tasks_of(self.tasks))
        none = isinstance(self.shifted, Sequence) and not self.shifted
        beyond = () if none else tuple(tasks_of(self.shifted))
        names = [task.name for task in (*within, *beyond)]
        if len(set(names)) < len(names):
            raise EvaluationError(f"`tasks` and `shifted` must have different names; got {names}. Pass `name` to one.")
        check_integer("patience", self.patience)
        if self.stop_every is not None:
            check_integer("stop_every", self.stop_every)
            if not beyond:
                raise ValueError("`stop_every` needs `shifted`: trainings are compared on the shifted sets.")
        return NamedSets(within, beyond, tokenizer, self.stop_every, self.patience)


@contextlib.contextmanager
def stages_of(
    base: Any, template: Any, train: Any, options: SetOptions, training: Mapping[str, Any], where: RunSettings
) -> Iterator[Stages]:
    """What trains the arms of a selection; `training` has the fields of `TrainSettings` but `train`.

    Raises: ValueError, TypeError, EvaluationError for invalid arguments.
    """
    if len(where.seeds) == 2:
        raise EvaluationError("`seeds` must be one, or at least 3: the spread of two cannot be told. Add a seed.")
    check_source(base, len)
    tokenizer = load_tokenizer(base) if options.tokenizer is None else options.tokenizer
    sets: Any = options.named(tokenizer)
    data, collate = _data_of(train, tokenizer, training["collate_fn"])
    check_data(data)
    settings = TrainSettings(**{**training, "collate_fn": collate}, train=None)
    model = model_of(base)
    modules = tuple(target_modules(model, template))
    work = Work(model if where.executor is None else base, data, sets, settings, where.progress)
    with contextlib.ExitStack() as stack:
        directory = where.records or stack.enter_context(tempfile.TemporaryDirectory())
        yield Stages(work, sets, template, modules, replace(where, records=directory), model)


def estimate_of(stages: Stages, trainings: int, largest: int, scoring_seconds: float) -> CostEstimate:
    """Time one step at the largest rank where trainings run, count memory, and say both on stderr."""
    config = with_ranks(stages.template, stages.uniform(largest))
    settings = name_of(stages.work.model) | stages.work.settings.record(stages.work.train_data)
    trial = Trial(
        "timed step",
        timed_trial,
        {"work": stages.sent, "config": config},
        settings | {"config": plain_config(config)},
    )
    timed = stages.run([trial], whole=True)[trial.key]["seconds_per_step"]
    work = stages.work
    batch = next(iter(batches_for(stages)))
    try:
        memory = accounting(stages.model, config, inputs=batch).memory.total if isinstance(batch, Mapping) else None
    except LorakitError:
        memory = None
    found = CostEstimate(trainings, work.settings.steps, timed, scoring_seconds, memory)
    if stages.where.progress:
        tqdm.write(str(found), file=sys.stderr)
    return found


def batches_for(stages: Stages) -> DataLoader[Any]:
    """The training data in its own order, in batches."""
    settings = stages.work.settings
    return DataLoader(stages.work.train_data, settings.batch_size, collate_fn=settings.collate_fn)


def _data_of(train: Any, tokenizer: Any, collate_fn: Any) -> tuple[Any, Any]:
    if is_source(train):
        if tokenizer is None:
            raise EvaluationError("`tokenizer` must be given with a path or dataset: `base` has none beside it.")
        train = loader(train, tokenizer)
    if isinstance(train, DataLoader):
        return train.dataset, collate_fn or train.collate_fn
    return train, collate_fn
