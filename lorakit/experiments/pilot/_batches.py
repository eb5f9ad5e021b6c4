"""The batches and the loss of a pilot that looks at gradients without training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from lorakit._checks import check_integer
from lorakit.calibration.state import input_device
from lorakit.errors import CalibrationError

PilotLoss = Callable[[Any, Any], Tensor]


def pilot_batches(model: nn.Module, loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    """Up to `num_batches` batches, on the model's device.

    Raises: ValueError for a wrong `num_batches`; TypeError for a loader that is not iterable; CalibrationError for one
    without a batch.
    """
    check_integer("num_batches", num_batches)
    try:
        batches = iter(loader)
    except TypeError:
        raise TypeError(f"`loader` must be an iterable of batches; got {type(loader).__name__}.") from None
    device, found = input_device(model), False
    for batch in itertools.islice(batches, num_batches):
        found = True
        yield batch if device is None else send_to_device(batch, device)
    if not found:
        raise CalibrationError("`loader` must yield at least one batch; got none. Make a used iterator anew.")


def batch_loss(model: nn.Module, batch: Any, loss_fn: PilotLoss | None) -> Tensor:
    """The loss of a batch: ``loss_fn(model, batch)``, or the model's own.

    Raises: CalibrationError unless it is one finite number that depends on what is differentiated.
    """
    if loss_fn is None and not hasattr(batch, "keys"):
        raise CalibrationError(
            f"`loader` must yield mappings for model(**batch); got {type(batch).__name__}. Tokenize and collate the "
            f"examples (lorakit.data.loader does), or pass `loss_fn`."
        )
    loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise CalibrationError(
            "The loss of a batch must be a tensor with one number; "
            f"got {f'shape {tuple(loss.shape)}' if isinstance(loss, Tensor) else type(loss).__name__}. "
            "Give the examples labels, or pass `loss_fn`."
        )
    if not loss.requires_grad:
        raise CalibrationError("The loss of a batch does not depend on any of the modules that were chosen.")
    check_finite(loss.detach(), "The loss of a batch")
    return loss.reshape(())


def check_finite(values: Tensor, what: str) -> None:
    """Raises: CalibrationError, naming `what`, unless all values are finite."""
    if not bool(torch.isfinite(values).all()):
        raise CalibrationError(f"{what} is not finite: check the data, or load the model in float32.")
