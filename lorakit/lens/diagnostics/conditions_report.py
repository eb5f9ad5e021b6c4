"""The report of `lorakit.lens.conditions`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import number
from lorakit._report import Report
from lorakit.errors import Finding
from lorakit.lens._rows import grouped, mean
from lorakit.lens.diagnostics._next_steps import on_disk, short_name
from lorakit.naming.roles import Role, group_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = ("init", "random", "trained")


@dataclass(frozen=True)
class ConditionedModule:
    """One module's capacity utilization (CU), effective rank over `rank`, under the three conditions.

    `init` is None if the initialization needs the base weight or data. `random` is the mean over draws, and
    `random_std` their standard deviation (n − 1 in the denominator), None for a single draw.
    """

    module_name: str
    role: Role | None
    layer: int | None
    rank: int
    low_rank_part_only: bool
    init: float | None
    random: float
    random_std: float | None
    trained: float

    @property
    def group(self) -> str:
        return group_of(self.module_name)


@dataclass(frozen=True)
class ConditionedGroup:
    """The modules of one role, or all: means of their capacity utilization.

    `trained_std` is the standard deviation over modules, and `random_std` that of the group's mean over draws, both
    with n − 1 in the denominator and None for a single value.
    """

    name: str
    modules: int
    init: float | None
    random: float
    random_std: float | None
    trained: float
    trained_std: float | None


@dataclass(frozen=True)
class AdapterConditions:
    """One adapter. If it has no init condition, `init_reason` says why.

    `total` is None if no module is finite. `qv_gap` is, by condition, the mean capacity utilization of the query
    projections minus that of the value projections; None if the adapter lacks either.
    """

    path: str
    peft_type: str
    ranks: tuple[int, int] | None
    init_reason: str | None
    modules: tuple[ConditionedModule, ...]
    total: ConditionedGroup | None
    roles: tuple[ConditionedGroup, ...]
    qv_gap: dict[str, float | None]

    @property
    def mean_rank(self) -> float:
        return statistics.fmean(module.rank for module in self.modules)


@dataclass(frozen=True, repr=False)
class ConditionsReport(Report):
    """The result of `lorakit.lens.conditions`: one entry for each adapter, in the order given."""

    seed: int
    draws: int
    adapters: tuple[AdapterConditions, ...]
    findings: tuple[Finding, ...]

    @property
    def headline(self) -> str:
        below = sum(one.total is not None and one.total.trained < one.total.random for one in self.adapters)
        return f"{below} of {len(self.adapters)} adapters use less of their rank than random factors do"

    @property
    def details(self) -> tuple[str, ...]:
        lines = []
        for one in self.adapters:
            if one.total is None:
                lines.append(f"{one.path}: no finite module")
                continue
            init = "" if one.total.init is None else f"init {number(one.total.init)}, "
            gaps = [one.qv_gap[condition] for condition in ("trained", "random")]
            gap = "" if None in gaps else f"; Q–V gap {gaps[0]:+.3f}, at random {gaps[1]:+.3f}"
            text = f"CU {init}random {number(one.total.random)}, trained {number(one.total.trained)}"
            lines.append(f"{one.path}: {text}{gap}")
        return tuple(lines)

    @property
    def next_steps(self) -> tuple[str, ...]:
        paths = [on_disk(one.path) for one in self.adapters]
        return tuple(f"lorakit audit {path} --suggest-ranks" for path in paths if path is not None)

    def to_dict(self) -> dict[str, Any]:
        """`adapters`, `seed`, `draws` and `findings` as plain data for JSON, without NaN and infinity."""
        return super().to_dict()

    def rows(self) -> list[dict[str, Any]]:
        """One row for each adapter and role, and one for all its modules."""
        return [
            {"path": one.path, **asdict(group), "qv_gap": one.qv_gap["trained"] if group is one.total else None}
            for one in self.adapters
            for group in (one.total, *one.roles)
            if group is not None
        ]

    def plot(self, adapter: int | None = None) -> Figure:
        """LoRA-Lens's Figure 1.

        Left: CU under the conditions against rank, one point an adapter. Right: effective rank by layer and role of one
        adapter, trained (solid) and random (dashed).

        Args:
            adapter: the index in `adapters` of the one on the right; by default the one with the middle rank.
        Raises: IndexError for an adapter that does not exist.
        """
        shown = sorted((one for one in self.adapters if one.modules), key=lambda one: one.mean_rank)
        chosen = self.adapters[adapter] if adapter is not None else shown[len(shown) // 2] if shown else None
        figure = new_figure(11, 4.5)
        left, right = figure.subplots(1, 2)
        _draw_utilization(left, shown)
        if chosen is not None:
            _draw_layers(right, chosen)
        return figure


def _draw_utilization(axes: Any, adapters: Sequence[AdapterConditions]) -> None:
    for condition, colour in zip(CONDITIONS, ("C7", "C0", "C3"), strict=True):
        points = [
            (one.mean_rank, value, getattr(one.total, f"{condition}_std", None) or 0.0)
            for one in adapters
            if (value := getattr(one.total, condition)) is not None
        ]
        if points:
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=spread, fmt="o-", ms=5, capsize=2, color=colour, label=condition)
    ranks = sorted({one.mean_rank for one in adapters})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
    axes.minorticks_off()
    axes.set(xlabel="rank r", ylabel="capacity utilization r̂ / r", ylim=(-0.03, 1.08))
    axes.set_title(f"Mean over modules, {len(adapters)} adapter{'s' if len(adapters) != 1 else ''}")
    if adapters:
        axes.legend(fontsize=8)


def _draw_layers(axes: Any, adapter: AdapterConditions) -> None:
    groups, _ = grouped(module for module in adapter.modules if module.layer is not None)
    for i, (name, modules) in enumerate(groups.items()):
        layers = sorted({module.layer for module in modules if module.layer is not None})
        at = [[module for module in modules if module.layer == layer] for layer in layers]
        trained = [mean(module.trained * module.rank for module in each) for each in at]
        random = [mean(module.random * module.rank for module in each) for each in at]
        axes.plot(layers, trained, "o-", ms=3, color=f"C{i}", label=escape_mathtext(name))
        axes.plot(layers, random, "--", lw=1, color=f"C{i}")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    low, high = adapter.ranks or (0, 0)
    rank = f"r = {low}" if low == high else f"r from {low} to {high}"
    title = escape_mathtext(f"{short_name(adapter.path)}, {rank}")
    axes.set(xlabel="layer", ylabel="effective rank r̂", ylim=(0, (high or 1) * 1.05), title=title)
    if groups:
        axes.plot([], [], "--", lw=1, color="k", label="random")
        axes.legend(fontsize=8, ncols=2)
