"""Batches of any kind: cut into single examples, or into parts of bounded size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import CalibrationError


def examples_of(batch: Any) -> list[Any]:
    """The batch as single examples: everything whose first dimension is the batch's is sliced.

    Raises: CalibrationError if the batch does not say how many examples it has.
    """
    n = batch_size(batch)

    def example(value: Any, i: int) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and value.shape[0] == n else value
        if isinstance(value, list) and len(value) == n and not any(isinstance(item, Tensor) for item in value):
            return value[i : i + 1]
        return _map_items(value, lambda item: example(item, i))

    return [example(batch, i) for i in range(n)]


def differentiable(batch: Any) -> Any:
    """The batch with its inference tensors cloned, since autograd cannot save those."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    return _map_items(batch, differentiable)


def token_parts(batch: Any, max_tokens: float) -> list[Any]:
    """The batch in parts of about equal size, in order, each at most `max_tokens` tokens or one example.

    Only a mapping whose values are all tensors of shape (n,) or (n, length) is cut; any other batch is one part. No
    part has as many examples as tokens, because the two could not be told apart.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else []
    if not all(isinstance(v, Tensor) and 1 <= v.ndim <= 2 for v in values) or len({len(v) for v in values}) != 1:
        return [batch]
    n, length = len(values[0]), max((v.shape[1] for v in values if v.ndim == 2), default=1)
    count = math.ceil(n / max(1, max_tokens // max(1, length)))
    while 1 < length in (n // max(1, count), math.ceil(n / max(1, count))):
        count += 1
    if count <= 1:
        return [batch]
    split = {key: torch.tensor_split(value, count) for key, value in batch.items()}
    return [{key: parts[i] for key, parts in split.items()} for i in range(count)]


def batch_size(batch: Any) -> int:
    """How many examples a batch has.

    Raises: CalibrationError if its tensors do not agree.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor):
        return values.shape[0]
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return int(batch["labels"].shape[0])
    sizes = {v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim} if isinstance(values, list | tuple) else ()
    if len(sizes) != 1:
        raise CalibrationError(
            "The model mixes the examples of a batch before an adapted module, so examples must run one at a time, and "
            "it is not clear how to split this batch. Give `loader` a batch size of 1."
        )
    return next(iter(sizes))


def _map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same kind with `function` applied to its items; any other value unchanged."""
    if isinstance(value, MutableMapping):
        mapped = copy.copy(value)  # the same class, because a loss function may use more of it than its items
        for key, item in value.items():
            mapped[key] = function(item)
        return mapped
    if isinstance(value, tuple):
        items = [function(item) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return [function(item) for item in value] if isinstance(value, list) else value
