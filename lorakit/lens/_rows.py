"""Rows of reports, grouped by role and by layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Protocol, TypeVar

from lorakit.naming.roles import Role


class Placed(Protocol):
    """A row with a group (a role or, without one, the last part of a name) and a layer, or None."""

    @property
    def group(self) -> str: ...
    @property
    def layer(self) -> int | None: ...


class ModuleRow:
    """Base class of rows about one module."""

    module_name: str
    role: Role | None

    @property
    def group(self) -> str:
        """The role, or the last part of the module's name if it has none."""
        return self.role or self.module_name.rpartition(".")[2]


Row = TypeVar("Row", bound=Placed)


def grouped(rows: Iterable[Row]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Rows by group, in order of appearance, and by layer, in ascending order; rows without a layer are in no layer."""
    groups: dict[str, list[Row]] = {}
    layers: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
        if row.layer is not None:
            layers.setdefault(row.layer, []).append(row)
    return groups, {str(layer): layers[layer] for layer in sorted(layers)}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    peak = max(map(abs, numbers)) or 1.0  # the sum may overflow
    return peak * statistics.fmean(value / peak for value in numbers)
