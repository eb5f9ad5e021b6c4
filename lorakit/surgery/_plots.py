"""Figures of values by module and singular component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit._figures import escape_mathtext, new_figure
from lorakit.naming.roles import group_of, layer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Quantity:
    """What a map shows: a label, the values of a row by component, and the midpoint of a two-sided color scale."""

    label: str
    values: Callable[[Any], Sequence[float]]
    center: float | None = None


def component_maps(title: str, modules: Sequence[Any], quantities: Sequence[Quantity]) -> Figure:
    """Maps of modules × components: one column of panels for each role, one line of panels for each quantity."""
    groups: dict[str, list[Any]] = {}
    for module in modules:
        groups.setdefault(group_of(module.module_name), []).append(module)
    tallest = max(map(len, groups.values()), default=1)
    figure = new_figure(2.4 + 2.2 * max(len(groups), 3), 1.0 + len(quantities) * (1.4 + 0.12 * tallest))
    figure.suptitle(escape_mathtext(title), wrap=True)
    if not groups:
        figure.text(0.5, 0.5, "no module has singular components to show", ha="center")
        return figure
    panels = figure.subplots(len(quantities), len(groups), squeeze=False)
    for line, quantity in zip(panels, quantities, strict=True):
        matrices = [_matrix(rows, quantity) for rows in groups.values()]
        scale = _scale(matrices, quantity.center)
        for axes, (name, rows), matrix in zip(line, groups.items(), matrices, strict=True):
            image = axes.imshow(matrix, aspect="auto", interpolation="nearest", **scale)
            axes.set(title=escape_mathtext(name), xlabel="component")
            layers = [layer_of(row.module_name) for row in rows]
            step = -(-len(rows) // 8)
            places = range(0, len(rows), step)
            axes.set_yticks(list(places), [str(i if layers[i] is None else layers[i]) for i in places])
            last = matrix.shape[1] - 1
            axes.set_xticks(sorted({0, last}), [str(place + 1) for place in sorted({0, last})])
        line[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(line), label=quantity.label)
    return figure


def _matrix(rows: Sequence[Any], quantity: Quantity) -> np.ma.MaskedArray[Any, Any]:
    """The values (modules, components) of rows of unequal length; missing components are masked."""
    values = [list(quantity.values(row)) for row in rows]
    width = max(map(len, values))
    padded = np.array([line + [np.nan] * (width - len(line)) for line in values])
    masked: np.ma.MaskedArray[Any, Any] = np.ma.masked_invalid(padded)
    return masked


def _scale(matrices: Sequence[np.ma.MaskedArray[Any, Any]], center: float | None) -> dict[str, Any]:
    """The color scale of all maps of a quantity; symmetric around `center` if there is one."""
    low = min(float(matrix.min()) for matrix in matrices)
    high = max(float(matrix.max()) for matrix in matrices)
    if center is None:
        return {"cmap": "viridis", "vmin": low, "vmax": high}
    reach = max(abs(low - center), abs(high - center)) or 1.0
    return {"cmap": "RdBu_r", "vmin": center - reach, "vmax": center + reach}
