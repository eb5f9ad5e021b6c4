"""The settings that all trainings of an experiment share, checked where they enter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lorakit._checks import check_integer, check_number
from lorakit.errors import PlanError
from lorakit.experiments._plan import Shard, read_shard

Train = Callable[[Any, Iterator[Any], int], Any]
Schedule = Literal["cosine", "linear", "constant"]
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainSettings:
    """The arguments of a training that `rank_sweep` and `adapt_each_layer` share; see `rank_sweep` for their meaning.

    `group_by_length`: batches are of examples of similar length (of their `input_ids`), as transformers' Trainer groups
    them.
    `micro_batch_size`: how many examples of a batch run at a time; the gradient is that of the whole batch.
    Raises: ValueError, naming the argument, for values that are not allowed.
    """

    steps: int
    batch_size: int | None
    learning_rate: float
    weight_decay: float
    warmup_steps: int | None
    schedule: Schedule
    collate_fn: Callable[[list[Any]], Any] | None
    train: Train | None
    group_by_length: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_integer("steps", self.steps)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size)
        if self.micro_batch_size is not None:
            check_integer("micro_batch_size", self.micro_batch_size)
        check_number("learning_rate", self.learning_rate, above=0.0)
        if self.warmup_steps is not None:
            check_integer("warmup_steps", self.warmup_steps, least=0)
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"`schedule` must be one of {', '.join(get_args(Schedule))}; got {self.schedule!r}.")
        if self.group_by_length and self.batch_size is None:
            raise ValueError("`group_by_length` needs a `batch_size`: without one, the data are batches already.")

    @property
    def warmup(self) -> int:
        """Warm-up steps: by default a twentieth of all steps."""
        return math.ceil(self.steps / 20) if self.warmup_steps is None else self.warmup_steps

    def record(self, train_data: Any) -> dict[str, Any]:
        """The settings as plain data, with what identifies the data."""
        return {
            "train_examples": len(train_data),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_steps": self.warmup,
            "schedule": self.schedule,
            "max_grad_norm": MAX_GRAD_NORM,
            "train": None if self.train is None else getattr(self.train, "__qualname__", type(self.train).__name__),
            **({"group_by_length": True} if self.group_by_length else {}),
        }


@dataclass(frozen=True)
class RunSettings:
    """Where the trainings of an experiment run, and where their results are kept.

    Raises: ValueError, naming the argument, for values that are not allowed; PlanError (a ValueError) for an executor
    whose trainings would share one process, and for a shard without records.
    """

    seeds: Sequence[int]
    records: str | os.PathLike[str] | None
    executor: Executor | None
    shard: Shard | None
    progress: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", distinct_integers("seeds", self.seeds))
        if self.executor is not None and not isinstance(self.executor, Executor):
            raise PlanError(
                f"`executor` must be a concurrent.futures.Executor, or None; got {type(self.executor).__name__}."
            )
        if isinstance(self.executor, ThreadPoolExecutor):
            raise PlanError(
                "`executor` must run trainings in other processes: threads share one process's random generators. Use "
                "a ProcessPoolExecutor or a RayExecutor."
            )
        if self.shard is not None:
            read_shard(self.shard)
            if self.records is None:
                raise PlanError("`shard` needs `records`: the directory where all shards keep their results.")


def distinct_integers(name: str, values: Any, *, positive: bool = False) -> tuple[int, ...]:
    """The values as a tuple. Raises: ValueError unless they are a non-empty sequence of distinct integers."""
    found = tuple(values) if isinstance(values, Iterable) else ()
    integers = all(isinstance(v, int) and not isinstance(v, bool) and (v > 0 or not positive) for v in found)
    if not found or not integers or len(set(found)) != len(found):
        what = "distinct positive integers" if positive else "distinct integers"
        raise ValueError(f"`{name}` must be {what}, at least one; got {values!r}.")
    return found


def check_data(train_data: Any) -> None:
    """Raises: ValueError unless `train_data` is a map-style dataset with at least one example."""
    if not hasattr(train_data, "__len__") or not hasattr(train_data, "__getitem__") or len(train_data) == 0:
        raise ValueError(
            f"`train_data` must be a non-empty dataset with a length and an index, so that its order can be fixed; "
            f"got {type(train_data).__name__}."
        )
