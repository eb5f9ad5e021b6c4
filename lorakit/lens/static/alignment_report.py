"""What `lorakit.lens.alignment` reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, message_figure, new_figure, title_name
from lorakit._format import number
from lorakit._report import Report, Table, counted, plain, shell_argument
from lorakit.errors import Finding
from lorakit.lens._rows import mean
from lorakit.lens.render.figures import draw_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 7  # matrices in a row
_QUANTITIES = (("similarity", "|cos| of the leading directions"), ("overlap", "overlap of the top-k subspaces"))


@dataclass(frozen=True)
class AlignedGroup:
    """Modules of one role and output width, in the order of their layers; `similarity` and `overlap` are n × n.

    `similarity`: |cos| of the leading output directions. `overlap`: ‖U_aᵀ U_b‖_F² / k of the `k` leading ones, where
    `k` is the requested one or the smallest rank of an update in the group. `random_similarity` and `random_overlap`:
    their means for random directions. The other means are over pairs of different modules, None for a single module.
    """

    name: str
    modules: tuple[str, ...]
    layers: tuple[int | None, ...]
    d_out: int
    k: int
    similarity: tuple[tuple[float, ...], ...]
    overlap: tuple[tuple[float, ...], ...]
    similarity_mean: float | None
    overlap_mean: float | None
    random_similarity: float
    random_overlap: float

    @property
    def labels(self) -> list[str]:
        """The layers, if they tell the modules apart; otherwise the module names without their common ending."""
        if None not in self.layers and len(set(self.layers)) == len(self.layers):
            return [str(layer) for layer in self.layers]
        steps = [name.split(".") for name in self.modules]
        while len(steps) > 1 and all(len(s) > 1 and s[-1] == steps[0][-1] for s in steps):
            steps = [s[:-1] for s in steps]
        return [".".join(s) for s in steps]


@dataclass(frozen=True)
class AlignedPair:
    """The attention's output projection and the MLP's down projection of one layer, compared as in `AlignedGroup`."""

    output: str
    down: str
    layer: int
    d_out: int
    k: int
    similarity: float
    overlap: float
    random_similarity: float
    random_overlap: float


@dataclass(frozen=True, repr=False)
class AlignmentReport(Report):
    """What `lorakit.lens.alignment` found, for the requested `k`."""

    path: str
    peft_type: str
    k: int
    roles: tuple[AlignedGroup, ...]
    within_layer: tuple[AlignedPair, ...]
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        return f"Output directions of {self.path}"

    @property
    def headline(self) -> str:
        compared = [group for group in self.roles if group.overlap_mean is not None and group.overlap_mean > 0]
        if not compared:
            return f"No role has two modules to compare; {counted(self.findings)}."
        most = max(compared, key=lambda group: (group.overlap_mean or 0.0) / group.random_overlap)
        return (
            f"Most shared across layers: {most.name}, overlap {number(most.overlap_mean)} of the top {most.k} "
            f"directions, by chance {number(most.random_overlap)}; {counted(self.findings)}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        lines = [f"type: {self.peft_type}; k = {self.k}"]
        if self.within_layer:
            overlap, chance = (mean(getattr(p, name) for p in self.within_layer) for name in _fields("overlap"))
            lines.append(
                f"output and down projections of a layer: overlap {number(overlap)}, by chance {number(chance)}"
            )
        return tuple(lines)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """A command that audits the adapter and suggests ranks."""
        source = shell_argument(self.path)
        return () if source is None else (f"lorakit audit {source} --suggest-ranks",)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each role, without the matrices."""
        return [
            {key: value for key, value in group.items() if key not in ("similarity", "overlap")}
            for group in self.to_dict()["roles"]
        ]

    def to_dict(self) -> dict[str, Any]:
        """`roles`, `within_layer`, `summary` and `findings` as JSON data."""
        data = {
            "roles": [asdict(group) for group in self.roles],
            "within_layer": [asdict(pair) for pair in self.within_layer],
            "summary": {"path": self.path, "peft_type": self.peft_type, "k": self.k},
            "findings": [asdict(finding) for finding in self.findings],
        }
        return {key: plain(value) for key, value in data.items()}

    def tables(self) -> list[Table]:
        if not self.roles:
            return []
        columns: list[tuple[str, Callable[[AlignedGroup], str]]] = [
            ("role", lambda g: g.name),
            ("n", lambda g: str(len(g.modules))),
            ("d_out", lambda g: str(g.d_out)),
            ("|cos|", lambda g: number(g.similarity_mean)),
            ("chance", lambda g: number(g.random_similarity)),
            ("k", lambda g: str(g.k)),
            ("overlap", lambda g: number(g.overlap_mean)),
            ("chance", lambda g: number(g.random_overlap)),
        ]
        note = "Means over pairs of layers: |cos| of the leading output directions, overlap of the top k."
        if not self.within_layer:
            return [Table.of("", columns, self.roles, note=note)]
        rows = (*Table.of("", columns, self.roles).rows, self._within_row())
        note += " Last row: output against down projection of the same layer."
        return [Table("", tuple(heading for heading, _ in columns), rows, note, total=True)]

    def _within_row(self) -> tuple[str, ...]:
        pairs = self.within_layer
        names = ("similarity", "random_similarity", "overlap", "random_overlap")
        similarity, chance, overlap, overlap_chance = (number(mean(getattr(p, name) for p in pairs)) for name in names)
        k = str(min(pair.k for pair in pairs))
        return ("output–down", str(len(pairs)), str(pairs[0].d_out), similarity, chance, k, overlap, overlap_chance)

    def plot(self) -> Figure:
        """A matrix for each role, layer by layer and without the diagonal, above output against down projections."""
        title = f"Output directions of {title_name(self.path)} ({self.peft_type})"
        groups = [group for group in self.roles if len(group.modules) > 1]
        if not groups and not self.within_layer:
            return message_figure(title, "no role has two modules to compare")
        down = -(-len(groups) // _ACROSS)
        across = max(4, min(_ACROSS, len(groups)))
        heights = [2.1] * (2 * down) + [2.8] * bool(self.within_layer)
        figure = new_figure(1.75 * across + 1.0, sum(heights) + 0.5)
        grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
        for row, (quantity, label) in enumerate(_QUANTITIES):
            panels = [figure.add_subplot(grid[row * down + i // _ACROSS, i % _ACROSS]) for i in range(len(groups))]
            _draw_matrices(figure, panels, groups, quantity, label)
        if self.within_layer:
            for i, (quantity, label) in enumerate(_QUANTITIES):
                columns = slice(0, across // 2) if i == 0 else slice(across // 2, across)
                _draw_within_layer(figure.add_subplot(grid[-1, columns]), self.within_layer, quantity, label)
        figure.suptitle(title, fontsize=10)
        return figure


def _fields(quantity: str) -> tuple[str, str]:
    return quantity, f"random_{quantity}"


def _draw_matrices(
    figure: Figure, panels: Sequence[Axes], groups: Sequence[AlignedGroup], quantity: str, label: str
) -> None:
    """One quantity of all roles, in one scale of colours."""
    if not groups:
        return
    squares = [getattr(group, quantity) for group in groups]
    peak = max(value for square in squares for i, row in enumerate(square) for j, value in enumerate(row) if i != j)
    for axes, group, square in zip(panels, groups, squares, strict=True):
        image = draw_matrix(axes, square, group.labels, peak or 1.0)
        average, chance = getattr(group, f"{quantity}_mean"), getattr(group, f"random_{quantity}")
        k = "" if quantity == "similarity" else f", k = {group.k}"
        name = escape_mathtext(group.name)
        axes.set_title(f"{name}{k}\nmean {average:.3f}, chance {chance:.3f}", fontsize=7)
    figure.colorbar(image, ax=list(panels), pad=0.01).set_label(label, fontsize=7)


def _draw_within_layer(axes: Axes, pairs: Sequence[AlignedPair], quantity: str, label: str) -> None:
    layers = [pair.layer for pair in pairs]
    axes.plot(layers, [getattr(pair, quantity) for pair in pairs], "o", ms=4, label="output against down")
    axes.plot(layers, [getattr(pair, f"random_{quantity}") for pair in pairs], "--", lw=1, color="k", label="by chance")
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_title(f"within a layer: {label}", fontsize=8)
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=7)
