"""Budgets as people write them: numbers of parameters or bytes."""

from __future__ import annotations

import math
import re
from typing import Literal

Unit = Literal["parameters", "bytes"]

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?(b?)\s*", re.IGNORECASE)


def read_budget(budget: int | str) -> tuple[int, Unit]:
    """A budget as people write it: ``2000000`` or ``"2M"`` parameters, ``"4MB"`` or ``"4MiB"`` bytes.

    Raises: ValueError for anything else, and for a budget below 1.

    Example:
        >>> read_budget("2M"), read_budget("4MB")
        ((2000000, 'parameters'), (4000000, 'bytes'))
    """
    match = _BUDGET.fullmatch(str(budget)) if isinstance(budget, int | str) and not isinstance(budget, bool) else None
    number = float(match[1]) * _PREFIXES[(match[2] or "").lower()] if match else 0.0
    amount = int(number) if math.isfinite(number) else 0
    if match is None or amount < 1:
        raise ValueError(
            f"`budget` must be a positive number of parameters (2000000, 2M) or bytes (4MB, 4MiB); got {budget!r}."
        )
    return amount, "bytes" if match[3] else "parameters"
