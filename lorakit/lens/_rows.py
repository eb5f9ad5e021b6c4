"""Rows of reports by role and by layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Placed(Protocol):
    """What has a role, or a name in its stead, and a layer, or none."""

    @property
    def group(self) -> str: ...
    @property
    def layer(self) -> int | None: ...


Row = TypeVar("Row", bound=Placed)


def grouped(rows: Iterable[Row]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Rows by role, in the order in which roles come, and by layer, in theirs; those without a layer in none."""
    groups: dict[str, list[Row]] = {}
    layers: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
        if row.layer is not None:
            layers.setdefault(row.layer, []).append(row)
    return groups, {str(layer): layers[layer] for layer in sorted(layers)}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None; None where there are none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    peak = max(map(abs, numbers)) or 1.0  # the sum may overflow
    return peak * statistics.fmean(value / peak for value in numbers)
