"""The arguments that `select_ranks` and `marginal_gains` share, checked where they enter."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

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


@contextlib.contextmanager
def stages_of(
    base: Any,
    template: Any,
    train: Any,
    *,
    tasks: Any,
    shifted: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
    tokenizer: Any,
    stop_every: int | None,
    patience: int,
    training: Mapping[str, Any],
    where: RunSettings,
) -> Iterator[Stages]:
    """What trains the arms of a selection. Raises: ValueError, TypeError, EvaluationError for invalid arguments."""
    if len(where.seeds) == 2:
        raise EvaluationError("`seeds` must be one, or at least 3: the spread of two cannot be told. Add a seed.")
    within = tuple(tasks_of(tasks))
    beyond = (
        ()
        if isinstance(shifted, Sequence) and not shifted and not isinstance(shifted, str)
        else tuple(tasks_of(shifted))
    )
    names = [task.name for task in (*within, *beyond)]
    if len(set(names)) < len(names):
        raise EvaluationError(f"`tasks` and `shifted` must have different names; got {names}. Pass `name` to one.")
    if stop_every is not None and not beyond:
        raise ValueError("`stop_every` needs `shifted`: early stopping compares a training on the shifted sets.")
    if stop_every is not None and (stop_every < 1 or patience < 1):
        raise ValueError(f"`stop_every` and `patience` must be positive integers; got {stop_every}, {patience}.")
    check_source(base, len)
    if tokenizer is None:
        tokenizer = load_tokenizer(base)
    data, collate = _data_of(train, tokenizer, collate_fn)
    check_data(data)
    settings = TrainSettings(**training, collate_fn=collate, train=None)
    model = model_of(base)
    modules = tuple(target_modules(model, template))
    sets: Any = NamedSets(within, beyond, tokenizer, stop_every, patience)
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
