"""What all trainings of an experiment share, in this process or on its way to another one."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import pickle
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from lorakit._format import count
from lorakit.errors import PlanError
from lorakit.evaluation import load_base
from lorakit.experiments._executors import RayExecutor
from lorakit.experiments._losses import Evaluate
from lorakit.experiments._settings import TrainSettings

Source = nn.Module | str | os.PathLike[str] | Callable[[], nn.Module]
_LARGEST = 256 * 2**20  # bytes of a model that travels to each training


@dataclass(frozen=True)
class Work:
    """The arguments that all trainings of an experiment share."""

    model: Source
    train_data: Any
    evaluate: Evaluate
    settings: TrainSettings
    progress: bool = False

    def here(self) -> Work:
        """With the model itself, built if need be. Raises: EvaluationError, TypeError."""
        return replace(self, model=model_of(self.model))

    def packed(self, executor: Executor) -> bytes:
        """As bytes that a worker can open.

        Functions of a script or a notebook can be packed where cloudpickle is installed, as it is with Ray.
        Raises: PlanError, naming the argument, for what cannot be pickled, and for a model that is too large to be.
        """
        if isinstance(self.model, nn.Module):
            size = sum(t.nbytes for t in itertools.chain(self.model.parameters(), self.model.buffers()))
            if size > _LARGEST:
                raise PlanError(
                    f"`model` has {count(size)} bytes, too many to be sent to a worker for each training. Pass a path, "
                    f"a Hub id, or a function that returns the model, and each worker builds it once."
                )
        dumps = _dumps(executor)
        work = replace(self, progress=False)
        try:
            return dumps(work)
        except Exception as error:
            raise PlanError(_unpicklable(work, dumps, error)) from error


def opened(work: Work | bytes) -> tuple[Work, nn.Module]:
    """The work and its model. A worker unpacks it, and builds the model, once for all of its trainings."""
    found = _unpacked(work) if isinstance(work, bytes) else work
    assert isinstance(found.model, nn.Module)
    return found, found.model


def model_of(source: Source) -> nn.Module:
    """The model, or what a path or Hub id holds, or what a function returns.

    Raises: EvaluationError for what cannot be loaded; TypeError for a function that returns something else.
    """
    if isinstance(source, str | os.PathLike):
        loaded: nn.Module = load_base(source, task_type=None)
        return loaded
    if isinstance(source, nn.Module):
        return source
    built = source()
    if not isinstance(built, nn.Module):
        raise TypeError(f"`model` must return a model (torch.nn.Module); it returned {type(built).__name__}.")
    return built


def name_of(source: Source) -> dict[str, Any]:
    """What records say about a model: its class and size, or its path, or its function's name."""
    if isinstance(source, nn.Module):
        return {"model": type(source).__name__, "model_params": sum(p.numel() for p in source.parameters())}
    if isinstance(source, str | os.PathLike):
        return {"model": os.fspath(source)}
    return {"model": getattr(source, "__qualname__", type(source).__name__)}


def check_source(model: Any, evaluate: Any) -> None:
    """Raises: TypeError unless `model` is a model or can give one, and `evaluate` is a function."""
    if not isinstance(model, str | os.PathLike) and not callable(model):
        raise TypeError(
            f"`model` must be a model (torch.nn.Module), a path or Hub id, or a function that returns a model; got "
            f"{type(model).__name__}."
        )
    if not callable(evaluate):
        raise TypeError(f"`evaluate` must be a function of the model; got {type(evaluate).__name__}.")


@functools.lru_cache(maxsize=1)
def _unpacked(packed: bytes) -> Work:
    work: Work = pickle.loads(packed)
    return work.here()


def _dumps(executor: Executor) -> Callable[[Any], bytes]:
    for name in ("cloudpickle", *(["ray.cloudpickle"] if isinstance(executor, RayExecutor) else [])):
        try:
            dumps: Callable[[Any], bytes] = importlib.import_module(name).dumps
        except ImportError:
            continue
        return dumps
    return pickle.dumps


def _unpicklable(work: Work, dumps: Callable[[Any], bytes], error: Exception) -> str:
    parts = {field.name: getattr(work, field.name) for field in fields(work) if field.name != "settings"}
    parts |= {"collate_fn": work.settings.collate_fn, "train": work.settings.train}
    for name, value in parts.items():
        try:
            dumps(value)
        except Exception as found:
            return (
                f"`{name}` must be picklable, since other processes use it; got {type(value).__name__} ({found}). Use "
                f"functions and classes of a module's top level, without open files, locks or generators; or leave "
                f"`executor` out."
            )
    return f"The arguments must be picklable, since other processes use them: {error}"
