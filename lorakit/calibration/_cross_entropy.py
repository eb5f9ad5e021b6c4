"""Cross-entropy whose gradient takes the place of its log-probabilities in memory.

torch's own needs two more tensors as large as the logits for it. With a large vocabulary these are tens of megabytes,
which the allocator of a CPU makes page by page and gives back, for every example anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _CrossEntropy(torch.autograd.Function):
    """F.cross_entropy of logits (N, C) and classes (N,), to the bit; one backward pass, the gradient to rounding."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        log_probabilities = F.log_softmax(logits, dim=1)
        ctx.save_for_backward(log_probabilities, labels)
        ctx.ignore_index = ignore_index
        return F.nll_loss(log_probabilities, labels, ignore_index=ignore_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_probabilities, labels = ctx.saved_tensors
        counted = labels != ctx.ignore_index
        weights = (counted * (gradient / counted.sum().clamp(min=1))).unsqueeze(1)
        true = labels.masked_fill(~counted, 0).unsqueeze(1)
        difference = log_probabilities.exp_().scatter_add_(1, true, torch.full_like(weights, -1))
        return difference.mul_(weights), None, None


class _Lean(TorchFunctionMode):
    """Computes mean cross-entropies of logits in float32 or float64 by `_CrossEntropy`, and leaves all else alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: value for name, value in (kwargs or {}).items() if value is not None}
        ignore_index = given.pop("ignore_index", None)
        if (
            func is F.cross_entropy
            and given == {"reduction": "mean", "label_smoothing": 0.0}
            and all(type(tensor) is Tensor for tensor in args)
            and args[0].ndim == 2
            and args[0].dtype in (torch.float32, torch.float64)
            and args[1].ndim == 1
            and not args[1].is_floating_point()
        ):
            return cast(Any, _CrossEntropy).apply(*args, ignore_index)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def low_memory_cross_entropy(model: nn.Module) -> Iterator[None]:
    """Make the loss function of one of transformers' models lean; models that have none of their own stay as they are.

    The model calls the same function with the same arguments, and only the cross-entropy that this takes is another.
    """
    own = vars(model)
    if "_loss_function" not in own and (not hasattr(type(model), "loss_function") or own.get("loss_type") is None):
        yield
        return
    lean: Any = model
    loss_function, was_set = lean.loss_function, "_loss_function" in own

    def compute(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return loss_function(*args, **kwargs)
        with _Lean():
            return loss_function(*args, **kwargs)

    try:
        lean.loss_function = compute
        yield
    finally:
        if was_set:
            lean.loss_function = loss_function
        else:
            del lean._loss_function
