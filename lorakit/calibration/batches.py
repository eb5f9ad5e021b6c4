"""Batches of any kind, cut into single examples or into parts of bounded size."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import CalibrationError


def examples_of(batch: Any) -> list[Any]:
    """The batch, one example at a time: everything in it whose first dimension is the batch's is sliced."""
    n = batch_size(batch)

    def pick(value: Any, i: int) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and value.shape[0] == n else value
        if isinstance(value, MutableMapping):
            picked = copy.copy(value)  # of its own kind: a loss function may use more of it than its items
            for key, item in value.items():
                picked[key] = pick(item, i)
            return picked
        if isinstance(value, tuple):
            items = [pick(item, i) for item in value]
            return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
        if isinstance(value, list):
            return value[i : i + 1] if len(value) == n and not _has_tensors(value) else [pick(v, i) for v in value]
        return value

    return [pick(batch, i) for i in range(n)]


def token_parts(batch: Any, max_tokens: float) -> list[Any]:
    """The batch in parts of about equal size and at most `max_tokens` tokens (or one example), in its order.

    Only where it is a mapping of nothing but tensors (n,) and (n, length), so that what belongs to whom is certain. No
    part has as many examples as tokens, so that these can be told apart.
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
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor):
        return values.shape[0]
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return int(batch["labels"].shape[0])
    sizes = {v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim} if isinstance(values, list | tuple) else ()
    if len(sizes) != 1:
        raise CalibrationError(
            "This model mixes the examples of a batch before an adapted module, so they must be run one at a time, and "
            "how to split this batch is not clear. Pass batches of one example."
        )
    return next(iter(sizes))


def _has_tensors(values: list[Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values)
