"""Groups of adapted modules that are switched or trained together, and figures of a value for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from lorakit._figures import escape_mathtext
from lorakit.adapters.tuner_layers import AdaptedLayer
from lorakit.naming.roles import Role, group_of, layer_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

By = Literal["layer", "module", "role"]
Place = tuple[Role | None, int | None, tuple[str, ...]]


class Group(Protocol):
    """What a value is drawn for."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int | None: ...


def groups_of(layers: Sequence[AdaptedLayer], by: By) -> dict[str, list[AdaptedLayer]]:
    """Adapted layers grouped by layer, module or role, in the model's order."""
    groups: dict[str, list[AdaptedLayer]] = {}
    for one in layers:
        if by == "layer":
            key = layer_prefix(one.name) or one.name
        elif by == "role":
            key = one.group
        else:
            key = one.name
        groups.setdefault(key, []).append(one)
    return groups


def place_of(members: Sequence[AdaptedLayer], by: By) -> Place:
    """A group's role and layer, each None unless all its modules share it, and the names of its modules."""
    role = None if by == "layer" else members[0].role
    layer = None if by == "role" else members[0].layer
    return role, layer, tuple(member.name for member in members)


def draw(axes: Axes, by: By, rows: Sequence[tuple[Group, float, float | None]]) -> None:
    """Draw values with standard errors: bars by layer or role; for single modules one line a role."""
    axes.axhline(0, color="0.6", lw=0.8)
    if by == "module" and any(group.layer is not None for group, _, _ in rows):
        _lines(axes, rows)
    else:
        _bars(axes, by, rows)


def _bars(axes: Axes, by: By, rows: Sequence[tuple[Group, float, float | None]]) -> None:
    layers = [group.layer for group, _, _ in rows]
    numbered = by == "layer" and len({layer for layer in layers if layer is not None}) == len(layers)
    labels = [str(group.layer) if numbered else escape_mathtext(group.name) for group, _, _ in rows]
    axes.bar(range(len(rows)), [value for _, value, _ in rows], yerr=[error or 0.0 for _, _, error in rows], capsize=2)
    every = max(1, len(rows) // 40)
    long = max(map(len, labels)) * len(labels) / every > 80
    axes.set_xticks(range(0, len(rows), every), labels[::every], rotation=90 if long else 0)
    axes.set_xlabel("layer" if numbered else by)


def _lines(axes: Axes, rows: Sequence[tuple[Group, float, float | None]]) -> None:
    lines: dict[str, list[tuple[Group, float, float | None]]] = {}
    for row in rows:
        lines.setdefault(group_of(row[0].name), []).append(row)
    for label, members in lines.items():
        places = [-1 if group.layer is None else group.layer for group, _, _ in members]
        values, errors = [value for _, value, _ in members], [error or 0.0 for _, _, error in members]
        axes.errorbar(places, values, yerr=errors, fmt="o-", ms=4, capsize=2, label=escape_mathtext(label))
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    outside = any(group.layer is None for group, _, _ in rows)
    axes.set_xlabel("layer (−1: outside the layers)" if outside else "layer")
    axes.legend(fontsize=8)
