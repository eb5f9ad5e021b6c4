"""Losses as a user's function returns them, and their differences, paired by example."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.calibration.state import preserved_rng
from lorakit.errors import CalibrationError

Evaluate = Callable[[Any], float | Tensor | Sequence[float]]


@dataclass(frozen=True)
class MeanLoss:
    """A mean over examples, or of differences over examples, and its standard error; None for a single number."""

    value: float
    stderr: float | None


def check_arguments(model: Any, evaluate: Any) -> None:
    """Raises: TypeError for what is no model, or no function."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a model (torch.nn.Module); got {type(model).__name__}.")
    if not callable(evaluate):
        raise TypeError(f"`evaluate` must be a function of the model; got {type(evaluate).__name__}.")


def losses_of(model: nn.Module, evaluate: Evaluate, what: str, count: int | None = None) -> list[float]:
    """What `evaluate(model)` returns: the losses of the examples, or one number.

    Runs without gradients, and gives the random number generators back, so that each call finds the same state.
    Raises: CalibrationError, naming `what` was evaluated, for anything but finite numbers, and for another number of
    them than `count`.
    """
    with torch.no_grad(), preserved_rng(model):
        returned = evaluate(model)
    try:
        losses = torch.as_tensor(returned, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"`evaluate` must return a loss, or the losses of the examples (n,); for {what} it returned "
            f"{type(returned).__name__}."
        ) from error
    if losses.ndim > 1 or losses.numel() == 0:
        raise CalibrationError(
            f"`evaluate` must return a loss, or the losses of the examples (n,); for {what} it returned a tensor of "
            f"shape {tuple(losses.shape)}."
        )
    values: list[float] = losses.reshape(-1).tolist()
    if not all(map(math.isfinite, values)):
        wrong = sum(not math.isfinite(value) for value in values)
        raise CalibrationError(f"`evaluate` returned losses for {what} that are not finite ({wrong} of {len(values)}).")
    if count is not None and len(values) != count:
        raise CalibrationError(
            f"`evaluate` must return the losses of the same examples each time; for {what} it returned {len(values)}, "
            f"before {count}."
        )
    return values


def mean_of(values: Sequence[float]) -> MeanLoss:
    """The mean, and its standard error where there is more than one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return MeanLoss(mean, None)
    return MeanLoss(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n))


def difference(first: Sequence[float], second: Sequence[float]) -> MeanLoss:
    """The mean of first − second, paired by example."""
    return mean_of([a - b for a, b in zip(first, second, strict=True)])
