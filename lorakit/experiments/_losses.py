"""Losses that a user's function returns, and their differences, paired by example and by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from lorakit.calibration.state import preserved_rng
from lorakit.errors import CalibrationError

Evaluate = Callable[[Any], float | Tensor | Sequence[float]]


@dataclass(frozen=True)
class MeanLoss:
    """A mean and its standard error over examples, or over paired differences; None for a single number."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        return with_stderr(self.value, self.stderr)


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference of losses, paired by seed and by example.

    `stderr_seeds` is the standard error over the seeds' means, `stderr_examples` over the examples' means; each is None
    if there is only one. `stderr` is the root of the sum of their squares, which tends to be too large; None if both
    are None.
    """

    value: float
    stderr: float | None
    stderr_seeds: float | None
    stderr_examples: float | None

    def __str__(self) -> str:
        return with_stderr(self.value, self.stderr)


def with_stderr(value: float, stderr: float | None) -> str:
    """A number with its standard error, to two significant digits of that; or the number alone.

    Example:
        >>> with_stderr(4.874549, 0.000759), with_stderr(4.874549, None)
        ('4.87455 ± 0.00076', '4.875')
    """
    if not stderr:
        return f"{value:.4g}" + ("" if stderr is None else " ± 0")
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def check_arguments(model: Any, evaluate: Any) -> None:
    """Raises: TypeError unless `model` is a model and `evaluate` a function."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a model (torch.nn.Module); got {type(model).__name__}.")
    if not callable(evaluate):
        raise TypeError(f"`evaluate` must be a function of the model; got {type(evaluate).__name__}.")


def losses_of(model: nn.Module, evaluate: Evaluate, what: str, count: int | None = None) -> list[float]:
    """The losses of the examples, or the one number, that `evaluate(model)` returns.

    Runs without gradients. Every call finds the same state of the random number generators, which is then restored.
    Raises: CalibrationError, naming `what` was evaluated, unless they are finite numbers, `count` of them if given.
    """
    with torch.no_grad(), preserved_rng(model):
        returned = evaluate(model)
    wanted = f"`evaluate` must return a loss, or the losses of the examples (n,); for {what} it returned"
    try:
        losses = torch.as_tensor(returned, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{wanted} {type(returned).__name__}.") from error
    if losses.ndim > 1 or losses.numel() == 0:
        raise CalibrationError(f"{wanted} a tensor of shape {tuple(losses.shape)}.")
    values: list[float] = losses.reshape(-1).tolist()
    if not all(map(math.isfinite, values)):
        wrong = sum(not math.isfinite(value) for value in values)
        raise CalibrationError(
            f"`evaluate` must return finite losses; for {what} {wrong} of {len(values)} are NaN or infinite."
        )
    if count is not None and len(values) != count:
        raise CalibrationError(
            f"`evaluate` must return the losses of the same examples each time; for {what} it returned {len(values)}, "
            f"before {count}."
        )
    return values


def mean_of(values: Sequence[float]) -> MeanLoss:
    """The mean, and its standard error if there is more than one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return MeanLoss(mean, None)
    return MeanLoss(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n))


def difference(first: Sequence[float], second: Sequence[float]) -> MeanLoss:
    """The mean of first − second, paired by example."""
    return mean_of([a - b for a, b in zip(first, second, strict=True)])


def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> PairedDifference:
    """The mean of first − second. Each holds the examples' losses (n,) of every seed."""
    apart = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    over_seeds = mean_of(reduce(apart, "seed example -> seed", "mean").tolist())
    over_examples = mean_of(reduce(apart, "seed example -> example", "mean").tolist())
    errors = [error for error in (over_seeds.stderr, over_examples.stderr) if error is not None]
    return PairedDifference(
        over_seeds.value, math.hypot(*errors) if errors else None, over_seeds.stderr, over_examples.stderr
    )
