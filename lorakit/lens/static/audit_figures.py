"""The figures of an audit: heatmaps by role and layer, spectra, and energy against parameters."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from lorakit._figures import new_figure
from lorakit.lens._rows import grouped
from lorakit.lens.render.figures import Heatmap, count_axis, draw_heatmap, draw_lines, heatmap, heatmap_size
from lorakit.lens.static.groups import total_norm
from lorakit.lens.static.spectra import AuditedModule
from lorakit.lens.static.suggestions import RankSuggestion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LINES = 8
_POINTS = 400


@dataclass(frozen=True)
class Spectrum:
    """σ_k / σ_1 for k = 1, 2, …: the median over modules, and the quantiles 0.1 (`low`) and 0.9 (`high`).

    `norm` is √Σ ‖ΔW‖_F².
    """

    group: str
    norm: float
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """The share of Σ ‖ΔW‖_F² that is kept, by the number of parameters."""

    label: str
    parameters: tuple[int, ...]
    energy: tuple[float, ...]


def heatmaps(modules: Sequence[AuditedModule], energy: float) -> list[Heatmap]:
    """Capacity utilization, ‖ΔW‖_F and the energy rank of modules with finite updates; none if there are none."""
    threshold = str(float(energy))
    quantities: list[tuple[str, Callable[[AuditedModule], float | None]]] = [
        ("capacity utilization CU (effective rank / r)", lambda m: m.capacity_utilization),
        ("‖ΔW‖_F", lambda m: m.frobenius_norm),
        (
            f"k@{energy:g}: the rank that keeps {energy:.0%} of the energy",
            lambda m: (m.energy_rank or {}).get(threshold),
        ),
    ]
    finite = [module for module in modules if module.frobenius_norm is not None]
    return [heatmap(title, finite, quantity) for title, quantity in quantities] if finite else []


def spectra(modules: Sequence[AuditedModule]) -> list[Spectrum]:
    """The spectrum of each group, from its modules that are not zero."""
    groups, _ = grouped(module for module in modules if module.spectral_norm)
    return [_spectrum(group, members) for group, members in groups.items()]


def energy_curves(modules: Sequence[AuditedModule]) -> list[Curve]:
    """The energy that the greedy choice by energy per parameter keeps, and the energy that one rank for all keeps."""
    trained = [module for module in modules if module.spectral_norm]
    if not trained:
        return []
    peak = max(module.spectral_norm or 0.0 for module in trained)
    costs = [module.d_out + module.d_in for module in trained]
    gains = [[(value / peak) ** 2 for value in module.singular_values] for module in trained]
    total = sum(map(sum, gains))
    steps = heapq.merge(*([(-gain / cost, gain, cost) for gain in row] for row, cost in zip(gains, costs, strict=True)))
    greedy = [(gain, cost) for _, gain, cost in steps]
    uniform = [
        (
            sum(row[k] for row in gains if k < len(row)),
            sum(cost for row, cost in zip(gains, costs, strict=True) if k < len(row)),
        )
        for k in range(max(map(len, gains)))
    ]
    return [_accumulate("greedy", greedy, total), _accumulate("one rank for all", uniform, total)]


def draw_spectra(axes: Axes, found: Sequence[Spectrum], everything: Spectrum) -> None:
    """One median for each group, the eight with the most energy at most, over the band of all modules."""
    k = range(1, len(everything.median) + 1)
    axes.fill_between(k, everything.low, everything.high, color="0.88", lw=0, label="all, 10–90%")
    kept = sorted(found, key=lambda spectrum: -spectrum.norm)[:_MOST_LINES]
    shown = [spectrum for spectrum in found if spectrum in kept]
    draw_lines(axes, ((s.group, (range(1, len(s.median) + 1), s.median)) for s in shown))
    some = f" ({len(shown)} of {len(found)} roles, by energy)" if len(shown) < len(found) else ""
    axes.set_title(f"spectra, medians over modules{some}", fontsize=9)
    axes.set(xlabel="component k", ylabel="σ_k / σ_1", ylim=(0, 1.02))
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=8)


def draw_energy(axes: Axes, curves: Sequence[Curve], suggestions: Sequence[RankSuggestion]) -> None:
    """The curves, and a point for each suggestion."""
    draw_lines(axes, ((curve.label, (curve.parameters, curve.energy)) for curve in curves))
    for i, suggestion in enumerate(suggestions, len(curves)):
        axes.plot(suggestion.parameters, suggestion.energy_kept, "o", color=f"C{i}", label=suggestion.label)
    axes.set_title("energy against parameters", fontsize=9)
    axes.set(xlabel="parameters", ylabel="share of Σ ‖ΔW‖_F² kept", ylim=(0, 1.02), xlim=(0, None))
    count_axis(axes)
    axes.legend(fontsize=8, loc="lower right")


def overview(
    title: str, modules: Sequence[AuditedModule], energy: float, suggestions: Sequence[RankSuggestion]
) -> Figure:
    """Heatmaps above spectra and energy, in one figure."""
    maps, found, curves = heatmaps(modules, energy), spectra(modules), energy_curves(modules)
    sizes = [heatmap_size(shown) for shown in maps]
    heights = [height for _, height in sizes] + ([3.6] if found else [])
    figure = new_figure(max(10.0, *(width for width, _ in sizes)), sum(heights) + 0.6)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for i, shown in enumerate(maps):
        axes = figure.add_subplot(grid[i, :])
        draw_heatmap(axes, shown)
    axes.set_xlabel("layer", fontsize=9)
    if found:
        draw_spectra(figure.add_subplot(grid[-1, 0]), found, spectrum_of_all(modules))
        draw_energy(figure.add_subplot(grid[-1, 1]), curves, suggestions)
    figure.suptitle(title, fontsize=10)
    return figure


def spectrum_of_all(modules: Sequence[AuditedModule]) -> Spectrum:
    """The spectrum of all modules that are not zero."""
    return _spectrum("all", [module for module in modules if module.spectral_norm])


def _spectrum(group: str, modules: Sequence[AuditedModule]) -> Spectrum:
    lines = [[value / module.singular_values[0] for value in module.singular_values] for module in modules]
    columns = [[line[k] for line in lines if k < len(line)] for k in range(max(map(len, lines)))]
    low, median, high = zip(*(numpy.quantile(column, (0.1, 0.5, 0.9)).tolist() for column in columns), strict=True)
    return Spectrum(group, total_norm(modules), low, median, high)


def _accumulate(label: str, steps: Sequence[tuple[float, int]], total: float) -> Curve:
    parameters, energy, spent, kept = [0], [0.0], 0, 0.0
    stride = max(1, len(steps) // _POINTS)
    for i, (gain, cost) in enumerate(steps, 1):
        spent, kept = spent + cost, kept + gain
        if i % stride == 0 or i == len(steps):
            parameters.append(spent)
            energy.append(min(1.0, kept / total))
    return Curve(label, tuple(parameters), tuple(energy))
