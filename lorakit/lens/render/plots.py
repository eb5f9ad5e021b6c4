"""The figures of reports as PNG files, by matplotlib (the extra `plots`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit._figures import escape_mathtext, new_figure
from lorakit.lens.render.figures import Heatmap, comparison_heatmaps, energy_curves, heatmaps, spectra
from lorakit.lens.static.alignment import AlignedGroup, AlignmentReport
from lorakit.lens.static.compare import ComparisonReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.lens.static.report import AuditReport


_Scale = tuple[str, float | None, float | None]  # a colour map, and the values at its ends

# of `comparison_heatmaps`
_COMPARED: tuple[_Scale, ...] = (
    ("RdBu_r", -1.0, 1.0),
    ("viridis", 0.0, 1.0),
    ("viridis", 0.0, 1.0),
    ("RdBu_r", 0.0, 1.0),
)
_ACROSS = 4  # heatmaps in a row


def write_plots(
    report: AuditReport | ComparisonReport | AlignmentReport, directory: str | os.PathLike[str]
) -> list[Path]:
    """Write a report's figures into `directory`, made if need be; returns what was written.

    Of an audit heatmaps, spectra and the energy curve; of a comparison heatmaps; of an alignment a heatmap, layer by
    layer, for every role, and output against down projections. A figure for which there is nothing to show is left
    out. Raises: MissingExtraError without matplotlib.
    """
    if isinstance(report, ComparisonReport):
        figures = {"comparison.png": _heatmaps(comparison_heatmaps(report), _COMPARED)}
    elif isinstance(report, AlignmentReport):
        figures = {
            "similarity.png": _between_layers(report, "similarity"),
            "overlap.png": _between_layers(report, "overlap"),
            "within_layer.png": _within_layer(report),
        }
    else:
        figures = {
            "heatmaps.png": _heatmaps(heatmaps(report)),
            "spectra.png": _spectra(report),
            "energy.png": _energy(report),
        }
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(target / name, dpi=120)
            written.append(target / name)
    return written


def _heatmaps(maps: list[Heatmap], scales: Sequence[_Scale] = ()) -> Figure | None:
    """Heatmaps below each other, each in its scale of colours, or from its smallest to its largest value."""
    if not maps:
        return None
    across, down = len(maps[0].layers), len(maps[0].groups)
    figure = new_figure(max(6.0, 0.28 * across + 2.5), len(maps) * (0.3 * down + 0.9))
    scales = scales or [("viridis", None, None)] * len(maps)
    for axes, heatmap, (colours, low, high) in zip(
        figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, scales, strict=True
    ):
        values = [[float("nan") if value is None else value for value in row] for row in heatmap.values]
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high)
        every = max(1, across // 32)
        axes.set_xticks(range(0, across, every), heatmap.layers[::every], fontsize=7)
        axes.set_yticks(range(down), [escape_mathtext(group) for group in heatmap.groups], fontsize=8)
        axes.set_title(heatmap.title, fontsize=9)
        figure.colorbar(image, ax=axes, pad=0.01)
    figure.supxlabel("layer", fontsize=9)
    return figure


def _spectra(report: AuditReport) -> Figure | None:
    found = spectra(report)
    if not found:
        return None
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for spectrum in found:
        places = range(1, len(spectrum.median) + 1)
        (line,) = axes.plot(places, spectrum.median, label=escape_mathtext(spectrum.group))
        axes.fill_between(places, spectrum.low, spectrum.high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(
        xlabel="component k", ylabel="σ_k / σ_1", title="Spectra: median over layers, 10 to 90 % shaded", ylim=(0, 1.02)
    )
    axes.legend(fontsize=8)
    return figure


def _energy(report: AuditReport) -> Figure | None:
    curves = energy_curves(report)
    if not curves:
        return None
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for curve in curves:
        axes.plot([count / 1e6 for count in curve.parameters], curve.energy, label=curve.label)
    for suggestion in report.suggestions:
        axes.plot(suggestion.parameters / 1e6, suggestion.energy_kept, "o", label=suggestion.policy)
    axes.set(xlabel="parameters (millions)", ylabel="share of Σ ‖ΔW‖_F² kept", title="Energy against parameters")
    axes.legend(fontsize=8)
    return figure


def _between_layers(report: AlignmentReport, quantity: Literal["similarity", "overlap"]) -> Figure | None:
    groups = [group for group in report.roles if len(group.modules) > 1]
    if not groups:
        return None
    across = min(_ACROSS, len(groups))
    down = -(-len(groups) // across)
    squares = [_without_diagonal(getattr(group, quantity)) for group in groups]
    peak = max(value for square in squares for row in square for value in row if value == value)
    figure = new_figure(3.0 * across + 1.0, 3.3 * down + 0.5, layout="compressed")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, group, square in zip(panels, groups, squares, strict=False):
        axes.set_facecolor("0.9")
        image = axes.imshow(square, cmap="viridis", vmin=0, vmax=peak or 1)
        ticks, labels = _ticks(group)
        axes.set_xticks(ticks, labels, fontsize=6, rotation=0 if _short(labels) else 90)
        axes.set_yticks(ticks, labels, fontsize=6)
        chance = group.random_similarity if quantity == "similarity" else group.random_overlap
        between = group.similarity_mean if quantity == "similarity" else group.overlap_mean
        top = "" if quantity == "similarity" else f", k = {group.k}"
        axes.set_title(f"{escape_mathtext(group.name)}{top}\nmean {between:.3f}, by chance {chance:.3f}", fontsize=8)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    what = "|cos| of the leading output directions" if quantity == "similarity" else "Overlap of top output subspaces"
    figure.suptitle(f"{what}, layer by layer", fontsize=10)
    figure.colorbar(image, ax=list(panels), shrink=0.8, pad=0.01)
    return figure


def _without_diagonal(square: Sequence[Sequence[float]]) -> list[list[float]]:
    """The diagonal is 1, and would dull all else."""
    return [[float("nan") if i == j else value for j, value in enumerate(row)] for i, row in enumerate(square)]


def _ticks(group: AlignedGroup) -> tuple[list[int], list[str]]:
    every = max(1, len(group.labels) // 8)
    places = list(range(0, len(group.labels), every))
    return places, [escape_mathtext(group.labels[place]) for place in places]


def _short(labels: list[str]) -> bool:
    return all(len(label) <= 3 for label in labels)


def _within_layer(report: AlignmentReport) -> Figure | None:
    pairs = report.within_layer
    if not pairs:
        return None
    figure = new_figure(8, 4)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    layers = [pair.layer for pair in pairs]
    for label, values, chances, colour in (
        ("|cos| of the leading directions", "similarity", "random_similarity", "C0"),
        ("overlap of the top subspaces", "overlap", "random_overlap", "C1"),
    ):
        axes.plot(layers, [getattr(pair, values) for pair in pairs], "o", ms=4, color=colour, label=label)
        by_chance = [getattr(pair, chances) for pair in pairs]
        axes.plot(layers, by_chance, "--", lw=1, color=colour, label="… by chance")
    axes.set(xlabel="layer", ylim=(-0.02, 1.02), title="Output projection against down projection, within a layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure
