"""What a comparison of weights before and after fine-tuning reports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from lorakit._figures import message_figure, new_figure, title_name
from lorakit._format import number
from lorakit._report import Report, Table, counted, plain, shell_argument
from lorakit.errors import Finding
from lorakit.lens._rows import ModuleRow, grouped, mean
from lorakit.lens.render.figures import Points, draw_lines
from lorakit.lens.static.chance import random_similarity
from lorakit.naming.roles import Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LINES = 8


@dataclass(frozen=True)
class ComparedWeight(ModuleRow):
    """A weight W (d_out, d_in) that fine-tuning changed to W'. If one of them is not finite, the numbers are None.

    `singular_values`, `tuned_singular_values`: the leading ones of W and of W'. `spectrum_shift`: ‖σ' − σ‖₂ / ‖σ‖₂ of
    these.
    `output_cosines`, `input_cosines`: |cos| between the left (right) singular vectors of W and W' with the same index.
    `intruders`, `input_intruders`: indices, from 0, of the left (right) singular vectors of W' that resemble none of W.
    `update_…`: numbers of ΔW = W' − W. `relative_change`: ‖ΔW‖_F / ‖W‖_F. `residual`: ε = ‖ΔW − ΔW_adapter‖_F / ‖ΔW‖_F
    if an adapter has the module; `low_rank_part_only`: only the low-rank part of the adapter's update is known.
    """

    module_name: str
    role: Role | None
    layer: int | None
    d_out: int
    d_in: int
    frobenius_norm: float | None = None
    spectrum_shift: float | None = None
    update_frobenius_norm: float | None = None
    relative_change: float | None = None
    update_spectral_norm: float | None = None
    update_effective_rank: float | None = None
    update_stable_rank: float | None = None
    update_energy_rank: int | None = None
    output_cosine_mean: float | None = None
    input_cosine_mean: float | None = None
    intruders: tuple[int, ...] = ()
    input_intruders: tuple[int, ...] = ()
    residual: float | None = None
    low_rank_part_only: bool = False
    singular_values: tuple[float, ...] = ()
    tuned_singular_values: tuple[float, ...] = ()
    output_cosines: tuple[float, ...] = ()
    input_cosines: tuple[float, ...] = ()


@dataclass(frozen=True)
class ComparedWeights:
    """Weights of one role, or all: means over the finite ones; None if there are none.

    `relative_change`: √Σ ‖ΔW‖_F² / √Σ ‖W‖_F². `intruders`: how many there are on the output side; `with_intruders`: in
    how many weights. `residual`: √Σ ‖ΔW − ΔW_adapter‖_F² / √Σ ‖ΔW‖_F² over the `adapted` weights.
    """

    name: str
    weights: int
    relative_change: float | None
    spectrum_shift_mean: float | None
    update_effective_rank_mean: float | None
    output_cosine_mean: float | None
    input_cosine_mean: float | None
    intruders: int
    with_intruders: int
    adapted: int
    residual: float | None


@dataclass(frozen=True, repr=False)
class WeightsReport(Report):
    """What `lorakit.lens.compare_weights` found. `unchanged` weights are equal entry by entry."""

    base: str
    fine_tuned: str
    adapter: str | None
    rank: int | None
    top_k: int
    intruder_below: float
    energy: float
    modules: tuple[ComparedWeight, ...]
    unchanged: tuple[str, ...]
    only_base: tuple[str, ...]
    only_fine_tuned: tuple[str, ...]
    total: ComparedWeights
    roles: tuple[ComparedWeights, ...]
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        return f"Weights of {self.base} and {self.fine_tuned}"

    @property
    def headline(self) -> str:
        total = self.total
        if total.relative_change is None:
            return f"{len(self.modules)} weights changed, {len(self.unchanged)} did not; {counted(self.findings)}."
        return (
            f"{len(self.modules)} weights changed by {total.relative_change:.2%} (‖ΔW‖_F / ‖W‖_F), with "
            f"{total.intruders} intruder dimensions in {total.with_intruders} of them; {counted(self.findings)}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        lines = [f"{len(self.unchanged)} weights unchanged; effective rank of ΔW: "]
        lines[0] += number(self.total.update_effective_rank_mean) or "not known"
        if self.adapter is not None and self.total.residual is not None:
            lines.append(
                f"the adapter {self.adapter} leaves {self.total.residual:.1%} of ‖ΔW‖_F out, in {self.total.adapted} "
                "weights"
            )
        return tuple(lines)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """The PEFT config of a LoRA that could hold the change, or a command that audits the adapter."""
        adapter = None if self.adapter is None else shell_argument(self.adapter)
        if adapter is not None:
            return (f"lorakit audit {adapter} --suggest-ranks",)
        ranks = [row.update_energy_rank for row in self.modules if row.update_energy_rank]
        if not ranks:
            return ()
        targets = sorted({row.module_name.rpartition(".")[2] for row in self.modules})
        rank = sorted(ranks)[max(0, math.ceil(0.9 * len(ranks) - 1e-9) - 1)]
        return (f"peft.LoraConfig(r={rank}, target_modules={targets})",)

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as JSON data."""
        options = ("base", "fine_tuned", "adapter", "rank", "top_k", "intruder_below", "energy")
        summary = {
            **{name: getattr(self, name) for name in options},
            **{key: value for key, value in asdict(self.total).items() if key != "name"},
            **{name: list(getattr(self, name)) for name in ("unchanged", "only_base", "only_fine_tuned")},
            "roles": [asdict(group) for group in self.roles],
        }
        modules = [asdict(module) for module in self.modules]
        data = {"modules": modules, "summary": summary, "findings": [asdict(finding) for finding in self.findings]}
        return {key: plain(value) for key, value in data.items()}

    def tables(self) -> list[Table]:
        columns: list[tuple[str, Callable[[ComparedWeights], str]]] = [
            ("role", lambda g: g.name),
            ("n", lambda g: str(g.weights)),
            ("‖ΔW‖/‖W‖", lambda g: number(g.relative_change)),
            ("σ shift", lambda g: number(g.spectrum_shift_mean)),
            ("effective", lambda g: number(g.update_effective_rank_mean)),
            ("out cos", lambda g: number(g.output_cosine_mean)),
            ("in cos", lambda g: number(g.input_cosine_mean)),
            ("intruders", lambda g: str(g.intruders)),
            ("ε", lambda g: number(g.residual)),
        ]
        note = "ΔW relative to W; shift of the spectrum; effective rank of ΔW; mean |cos| of singular vectors with the "
        note += "same index, on both sides; intruder dimensions; ε: what the adapter leaves out of ΔW."
        return [Table.of("", columns, [*self.roles, self.total], note=note, total=True)] if self.modules else []

    def plot(self) -> Figure:
        """Singular values before and after, and |cos| of singular vectors with the same index, by role.

        Lines are medians over weights. References: Si et al. 2025, Fig. 1 and 2.
        """
        title = f"{title_name(self.base)} → {title_name(self.fine_tuned)}"
        groups, _ = grouped(row for row in self.modules if row.singular_values)
        if not groups:
            return message_figure(title, "no weight changed")
        shown = dict(sorted(groups.items(), key=lambda item: -_change(item[1]))[:_MOST_LINES])
        figure = new_figure(14, 4.5)
        spectra, outputs, inputs = figure.subplots(1, 3)
        draw_lines(spectra, _medians(shown, "singular_values"), "--", lw=1)
        for line in spectra.lines:
            line.set_label("")
        draw_lines(spectra, _medians(shown, "tuned_singular_values"), lw=1.2)
        spectra.plot([], [], "--", color="k", lw=1, label="before")
        spectra.plot([], [], "-", color="k", lw=1.2, label="after")
        spectra.set(title="singular values", xlabel="index", ylabel="σ", yscale="log")
        for axes, side, d in ((outputs, "output", "d_out"), (inputs, "input", "d_in")):
            draw_lines(axes, _medians(shown, f"{side}_cosines"), lw=1.2)
            widths = [getattr(row, d) for rows in shown.values() for row in rows]
            chance = random_similarity(round(sum(widths) / len(widths)))
            axes.axhline(chance, color="k", lw=1, ls="--", label="by chance")
            axes.set(title=f"|cos| of {side} vectors with the same index", xlabel="index", ylim=(0, 1.02))
        for axes in (spectra, outputs, inputs):
            axes.legend(fontsize=7)
        some = f", {len(shown)} of {len(groups)} roles" if len(shown) < len(groups) else ""
        figure.suptitle(f"{title} (medians over weights{some})", fontsize=10)
        return figure


def summarize(name: str, rows: Sequence[ComparedWeight]) -> ComparedWeights:
    """The summary of some weights."""
    finite = [row for row in rows if row.update_frobenius_norm is not None]
    size = math.hypot(*(row.frobenius_norm or 0.0 for row in finite))
    change = math.hypot(*(row.update_frobenius_norm or 0.0 for row in finite))
    adapted = [row for row in finite if row.residual is not None]
    target = math.hypot(*(row.update_frobenius_norm or 0.0 for row in adapted))
    missed = math.hypot(*((row.residual or 0.0) * (row.update_frobenius_norm or 0.0) for row in adapted))
    return ComparedWeights(
        name=name,
        weights=len(rows),
        relative_change=change / size if size else None,
        spectrum_shift_mean=mean(row.spectrum_shift for row in finite),
        update_effective_rank_mean=mean(row.update_effective_rank for row in finite),
        output_cosine_mean=mean(row.output_cosine_mean for row in finite),
        input_cosine_mean=mean(row.input_cosine_mean for row in finite),
        intruders=sum(len(row.intruders) for row in finite),
        with_intruders=sum(bool(row.intruders) for row in finite),
        adapted=len(adapted),
        residual=missed / target if target else None,
    )


def _change(rows: Sequence[ComparedWeight]) -> float:
    return math.hypot(*(row.update_frobenius_norm or 0.0 for row in rows))


def _medians(groups: Mapping[str, Sequence[ComparedWeight]], quantity: str) -> Iterator[tuple[str, Points]]:
    """A line for each group: the median over its weights at each index, from 1."""
    for name, rows in groups.items():
        columns = zip_longest(*(getattr(row, quantity) for row in rows))
        values = [statistics.median(value for value in column if value is not None) for column in columns]
        yield name, (range(1, len(values) + 1), values)
