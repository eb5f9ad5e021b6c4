"""An audit's figures as PNG files, by matplotlib (the extra `plots`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import MissingExtraError
from lorakit.lens._figures import energy_curves, heatmaps, spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.lens._report import AuditReport


def write_plots(report: AuditReport, directory: str | os.PathLike[str]) -> list[Path]:
    """Write heatmaps, spectra and the energy curve into `directory`, made if need be; returns what was written.

    A figure for which there is nothing to show is left out. Raises: MissingExtraError without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("Plots need matplotlib: pip install lorakit[plots]") from None
    figures = {
        "heatmaps.png": _heatmaps(report),
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


def _heatmaps(report: AuditReport) -> Figure | None:
    from matplotlib.figure import Figure

    maps = heatmaps(report)
    if not maps:
        return None
    across, down = len(maps[0].layers), len(maps[0].groups)
    figure = Figure(figsize=(max(6.0, 0.28 * across + 2.5), len(maps) * (0.3 * down + 0.9)), layout="constrained")
    for axes, heatmap in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in heatmap.values]
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        every = max(1, across // 32)
        axes.set_xticks(range(0, across, every), heatmap.layers[::every], fontsize=7)
        axes.set_yticks(range(down), [_plain(group) for group in heatmap.groups], fontsize=8)
        axes.set_title(heatmap.title, fontsize=9)
        figure.colorbar(image, ax=axes, pad=0.01)
    figure.supxlabel("layer", fontsize=9)
    return figure


def _spectra(report: AuditReport) -> Figure | None:
    from matplotlib.figure import Figure

    found = spectra(report)
    if not found:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for spectrum in found:
        places = range(1, len(spectrum.median) + 1)
        (line,) = axes.plot(places, spectrum.median, label=_plain(spectrum.group))
        axes.fill_between(places, spectrum.low, spectrum.high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(
        xlabel="component k", ylabel="σ_k / σ_1", title="Spectra: median over layers, 10 to 90 % shaded", ylim=(0, 1.02)
    )
    axes.legend(fontsize=8)
    return figure


def _energy(report: AuditReport) -> Figure | None:
    from matplotlib.figure import Figure

    curves = energy_curves(report)
    if not curves:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot([count / 1e6 for count in curve.parameters], curve.energy, label=curve.label)
    for suggestion in report.suggestions:
        axes.plot(suggestion.parameters / 1e6, suggestion.energy_kept, "o", label=suggestion.policy)
    axes.set(xlabel="parameters (millions)", ylabel="share of Σ ‖ΔW‖_F² kept", title="Energy against parameters")
    axes.legend(fontsize=8)
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
