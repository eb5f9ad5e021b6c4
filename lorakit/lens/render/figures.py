"""What the figures of audits and comparisons show, as numbers: drawn as SVG in `_html`, by matplotlib in `_plots`."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from lorakit.lens._rows import Row
from lorakit.lens.static.compare import ComparedModule, ComparisonReport
from lorakit.lens.static.report import AuditedModule, AuditReport


@dataclass(frozen=True)
class Heatmap:
    """A quantity by group (down) and layer (across): the mean where several modules meet, None where none does."""

    title: str
    groups: list[str]
    layers: list[int]
    values: list[list[float | None]]

    @property
    def extent(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        known = [value for row in self.values for value in row if value is not None]
        return min(known), max(known)


@dataclass(frozen=True)
class Spectrum:
    """σ_k / σ_1 over the modules of one group, for k = 1, 2, …: median, and what a tenth is below and above."""

    group: str
    low: list[float]
    median: list[float]
    high: list[float]


@dataclass(frozen=True)
class Curve:
    """Shares of Σ ‖ΔW‖_F² kept, by numbers of parameters."""

    label: str
    parameters: list[int]
    energy: list[float]


def heatmaps(report: AuditReport) -> list[Heatmap]:
    """Capacity utilization, ‖ΔW‖_F and the energy rank; none where no module lies in a layer."""
    threshold = str(float(report.energy))
    quantities: list[tuple[str, Callable[[AuditedModule], float | None]]] = [
        ("Capacity utilization (effective rank / r)", lambda m: m.capacity_utilization),
        ("‖ΔW‖_F", lambda m: m.frobenius_norm),
        (f"Rank that keeps {report.energy:.0%} of the energy", lambda m: (m.energy_rank or {}).get(threshold)),
    ]
    return _by_place([m for m in report.modules if m.frobenius_norm is not None], quantities)


def comparison_heatmaps(report: ComparisonReport) -> list[Heatmap]:
    """Cosine, the overlaps and the share of A; none where no module lies in a layer."""
    quantities: list[tuple[str, Callable[[ComparedModule], float | None]]] = [
        ("Cosine of the updates", lambda m: m.cosine),
        ("Overlap of the output subspaces", lambda m: m.output_overlap),
        ("Overlap of the input subspaces", lambda m: m.input_overlap),
        ("Share of A in ‖ΔW_A‖_F + ‖ΔW_B‖_F", lambda m: m.share_a),
    ]
    return _by_place([m for m in report.modules if m.verdict is not None], quantities)


def _by_place(modules: list[Row], quantities: list[tuple[str, Callable[[Row], float | None]]]) -> list[Heatmap]:
    placed = [m for m in modules if m.layer is not None]
    groups = list(dict.fromkeys(m.group for m in placed))
    layers = sorted({m.layer for m in placed if m.layer is not None})
    cells: dict[tuple[str, int | None], list[Row]] = {}
    for module in placed:
        cells.setdefault((module.group, module.layer), []).append(module)
    return [
        Heatmap(
            title, groups, layers, [[_mean(quantity, cells.get((g, layer), [])) for layer in layers] for g in groups]
        )
        for title, quantity in quantities
        if placed
    ]


def _mean(quantity: Callable[[Row], float | None], modules: list[Row]) -> float | None:
    values = [value for module in modules if (value := quantity(module)) is not None]
    return sum(value / len(values) for value in values) if values else None


def spectra(report: AuditReport) -> list[Spectrum]:
    """Of every group, from its modules that are not zero."""
    found = []
    for group in dict.fromkeys(m.group for m in report.modules):
        lines = [
            [value / m.singular_values[0] for value in m.singular_values]
            for m in report.modules
            if m.group == group and m.spectral_norm
        ]
        if not lines:
            continue
        columns = [sorted(line[k] for line in lines if k < len(line)) for k in range(max(map(len, lines)))]
        low, median, high = ([_quantile(column, share) for column in columns] for share in (0.1, 0.5, 0.9))
        found.append(Spectrum(group, low, median, high))
    return found


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def energy_curves(report: AuditReport) -> list[Curve]:
    """What the greedy choice by energy per parameter keeps, and what one rank for all modules keeps."""
    modules = [m for m in report.modules if m.spectral_norm]
    if not modules:
        return []
    peak = max(m.spectral_norm or 0.0 for m in modules)
    costs = [m.d_out + m.d_in for m in modules]
    gains = [[(value / peak) ** 2 for value in m.singular_values] for m in modules]
    total = sum(map(sum, gains))
    steps = heapq.merge(*([(-gain / cost, gain, cost) for gain in row] for row, cost in zip(gains, costs, strict=True)))
    greedy = _accumulate("greedy", [(gain, cost) for _, gain, cost in steps], total)
    uniform = [
        (
            sum(row[k] for row in gains if k < len(row)),
            sum(c for row, c in zip(gains, costs, strict=True) if k < len(row)),
        )
        for k in range(max(map(len, gains)))
    ]
    return [greedy, _accumulate("one rank for all", uniform, total)]


def _accumulate(label: str, steps: list[tuple[float, int]], total: float, points: int = 400) -> Curve:
    parameters, energy, spent, kept = [0], [0.0], 0, 0.0
    stride = max(1, len(steps) // points)
    for i, (gain, cost) in enumerate(steps, 1):
        spent, kept = spent + cost, kept + gain
        if i % stride == 0 or i == len(steps):
            parameters.append(spent)
            energy.append(min(1.0, kept / total))
    return Curve(label, parameters, energy)
