"""Drawing primitives: heatmaps by role and layer, square matrices, and lines, from plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import count
from lorakit.lens._rows import Row, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAYER_TICKS = 32
_GROUP_TICKS = 150
_MATRIX_TICKS = 8
_NO_LAYER = "–"
_MOST_INCHES = 40.0  # a picture of thousands of layers is no wider; a pixel then shows several
Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Heatmap:
    """A quantity by group (rows) and layer (columns): a mean over modules, None where there is no module.

    `colours` is a matplotlib colour map from `low` to `high` (by default the smallest and the largest value). `chance`
    are values that random updates would give; the colour bar marks them in red.
    """

    title: str
    groups: tuple[str, ...]
    layers: tuple[int | None, ...]
    values: tuple[tuple[float | None, ...], ...]
    colours: str = "viridis"
    low: float | None = None
    high: float | None = None
    chance: tuple[float, ...] = ()


def heatmap(title: str, rows: Sequence[Row], quantity: Callable[[Row], float | None], **style: Any) -> Heatmap:
    """A `Heatmap` of `quantity` over `rows`; rows without a layer are in a last column of their own."""
    groups = tuple(dict.fromkeys(row.group for row in rows))
    layers: list[int | None] = [*sorted({row.layer for row in rows if row.layer is not None})]
    if any(row.layer is None for row in rows):
        layers.append(None)
    cells: dict[tuple[str, int | None], list[float | None]] = {}
    for row in rows:
        cells.setdefault((row.group, row.layer), []).append(quantity(row))
    values = tuple(tuple(mean(cells.get((group, layer), ())) for layer in layers) for group in groups)
    return Heatmap(title, groups, tuple(layers), values, **style)


def draw_heatmap(axes: Axes, shown: Heatmap) -> None:
    """Draw a heatmap with its colour bar; cells without a module stay grey."""
    values = [[float("nan") if value is None else value for value in row] for row in shown.values]
    axes.set_facecolor("0.9")
    image = axes.imshow(values, aspect="auto", cmap=shown.colours, vmin=shown.low, vmax=shown.high)
    every = max(1, -(-len(shown.layers) // _LAYER_TICKS))
    labels = [_NO_LAYER if layer is None else str(layer) for layer in shown.layers]
    axes.set_xticks(range(0, len(labels), every), labels[::every], fontsize=7)
    skipped = max(1, -(-len(shown.groups) // _GROUP_TICKS))
    names = [escape_mathtext(group) for group in shown.groups[::skipped]]
    axes.set_yticks(range(0, len(shown.groups), skipped), names, fontsize=8)
    axes.set_title(shown.title, fontsize=9)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01)
    if all(float(value).is_integer() for row in shown.values for value in row if value is not None):
        bar.ax.locator_params(axis="y", integer=True)
    for level in shown.chance:
        bar.ax.axhline(level, color="red", lw=1.5)


def heatmap_size(shown: Heatmap) -> tuple[float, float]:
    """Width and height in inches that a heatmap needs."""
    width, height = 0.28 * len(shown.layers) + 2.5, 0.25 * len(shown.groups) + 0.75
    return min(max(6.5, width), _MOST_INCHES), min(height, _MOST_INCHES)


def heatmaps_figure(title: str, maps: Sequence[Heatmap]) -> Figure:
    """Heatmaps below each other, with one title for all."""
    sizes = [heatmap_size(shown) for shown in maps]
    heights = [height for _, height in sizes]
    figure = new_figure(max(width for width, _ in sizes), sum(heights) + 0.6)
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, shown in zip(panels, maps, strict=True):
        draw_heatmap(axes, shown)
    panels[-1].set_xlabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_matrix(axes: Axes, square: Sequence[Sequence[float]], labels: Sequence[str], high: float) -> Any:
    """Draw a symmetric matrix in colours from 0 to `high`, without its diagonal, and return the image."""
    values = [[float("nan") if i == j else value for j, value in enumerate(row)] for i, row in enumerate(square)]
    axes.set_facecolor("0.9")
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=high)
    every = max(1, len(labels) // _MATRIX_TICKS)
    places = range(0, len(labels), every)
    shown = [escape_mathtext(labels[place]) for place in places]
    short = all(len(label) <= 3 for label in shown)
    axes.set_xticks(places, shown, fontsize=6, rotation=0 if short else 90)
    axes.set_yticks(places, shown, fontsize=6)
    return image


def draw_lines(axes: Axes, lines: Iterable[tuple[str, Points]], style: str = "-", **options: Any) -> None:
    """Draw one line for each label, in the colours C0, C1, … that equal places have in other calls too."""
    for i, (label, (x, y)) in enumerate(lines):
        axes.plot(x, y, style, color=f"C{i % 10}", label=escape_mathtext(label), **options)


def count_axis(axes: Axes) -> None:
    """Write the numbers on the horizontal axis as 500k or 1M."""
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
