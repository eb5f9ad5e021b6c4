"""What a comparison of two adapters reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import message_figure, title_name
from lorakit._format import number, share
from lorakit._report import Report, Table, counted, plain, shell_argument
from lorakit.errors import Finding
from lorakit.lens._rows import ModuleRow, mean
from lorakit.lens.render.figures import Heatmap, heatmap, heatmaps_figure
from lorakit.lens.static.forecast_report import MergeForecast
from lorakit.lens.static.verdicts import VERDICTS, Reason, Thresholds, Verdict
from lorakit.naming.roles import Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST = 5


@dataclass(frozen=True)
class ComparedExperts:
    """How the experts of a group compare: their verdicts, and the quantiles of each number over them."""

    count: int
    verdicts: dict[Verdict, int]
    quantiles: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ComparedModule(ModuleRow):
    """A module that both adapters have. If one of its updates is not finite, the numbers and the verdict are None.

    `cosine`: ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖). `random_cosine`: its standard deviation if updates with the same spectra
    are rotated at random, 1 / √(d_out d_in). Principal angles (radians, ascending) and overlaps (the mean of their
    cos²) are between the column spaces (`output_`) and between the row spaces (`input_`) of the `directions_a` and
    `directions_b` leading directions. `random_…_overlap`: the mean overlap by chance, max(directions) / d. `share_a`:
    ‖ΔW_a‖_F / (‖ΔW_a‖_F + ‖ΔW_b‖_F). `sigma_ratio`: the larger over the smaller spectral norm, None if infinite.
    `low_rank_part_only`: one of the two has a DoRA magnitude or a SpecLoRA mask, which is not compared;
    `whole_update`: it is, from the base weight.

    A row with `experts` is a group of them, with the verdict of most; cosine and norms are of all their updates
    together, overlaps are means. A row of one expert has the `stack`, the parameter that it is stored in.
    """

    module_name: str
    role: Role | None
    layer: int | None
    kind: str
    d_out: int
    d_in: int
    rank_a: int
    rank_b: int
    low_rank_part_only: bool
    verdict: Verdict | None = None
    reason: Reason | None = None
    directions_a: int | None = None
    directions_b: int | None = None
    cosine: float | None = None
    random_cosine: float | None = None
    output_overlap: float | None = None
    input_overlap: float | None = None
    random_output_overlap: float | None = None
    random_input_overlap: float | None = None
    frobenius_norm_a: float | None = None
    frobenius_norm_b: float | None = None
    share_a: float | None = None
    spectral_norm_a: float | None = None
    spectral_norm_b: float | None = None
    sigma_ratio: float | None = None
    output_angles: tuple[float, ...] = ()
    input_angles: tuple[float, ...] = ()
    stack: str | None = None
    experts: ComparedExperts | None = None
    whole_update: bool = False


@dataclass(frozen=True)
class ComparedGroup:
    """Modules of one role, of one layer, or all; None if none of them is finite.

    `cosine`: of all the group's updates as one vector. `random_cosine`: its standard deviation if each update is
    rotated independently at random. Overlaps are means over the modules that have one.
    """

    name: str
    modules: int
    verdicts: dict[Verdict, int]
    cosine: float | None
    random_cosine: float | None
    output_overlap_mean: float | None
    random_output_overlap_mean: float | None
    input_overlap_mean: float | None
    random_input_overlap_mean: float | None
    frobenius_norm_a: float | None
    frobenius_norm_b: float | None
    share_a: float | None


@dataclass(frozen=True, repr=False)
class ComparisonReport(Report):
    """What `lorakit.lens.compare` found.

    `only_a` and `only_b`: the modules that the other adapter does not have. `base`: the path of the base weights, where
    it was given. `verdict` and `reason` are of all modules together, with the merge's weights; `forecast` says what is
    left of each adapter in the merge, or is None, and `no_forecast` says why.
    """

    path_a: str
    path_b: str
    peft_type_a: str
    peft_type_b: str
    base: str | None
    energy: float
    thresholds: Thresholds
    modules: tuple[ComparedModule, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    verdict: Verdict | None
    reason: Reason | None
    forecast: MergeForecast | None
    no_forecast: str | None
    total: ComparedGroup
    roles: tuple[ComparedGroup, ...]
    layers: tuple[ComparedGroup, ...]
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        return f"Comparison of {self.path_a} (A) and {self.path_b} (B)"

    @property
    def headline(self) -> str:
        if self.total.cosine is None:
            return f"No module with finite updates in both; {counted(self.findings)}."
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in self.total.verdicts.items() if n)
        return (
            f"{self.total.modules} modules compared: {verdicts}; cosine {self.total.cosine:+.2g}, by chance "
            f"±{number(self.total.random_cosine)}; {counted(self.findings)}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        return (
            *self._merge_lines(),
            f"A: {self.path_a} ({self.peft_type_a}), {len(self.only_a)} modules in A only",
            f"B: {self.path_b} ({self.peft_type_b}), {len(self.only_b)} modules in B only",
        )

    def _merge_lines(self) -> list[str]:
        lines = [] if self.verdict is None else [f"Overall: {self.verdict} ({self.reason})."]
        if self.forecast is not None:
            best = self.forecast.recommended
            strengths = " and ".join(
                f"{label}'s update at {value:.3g}"
                for label, value in (("A", best.strength_a), ("B", best.strength_b))
                if value is not None
            )
            lines.append(f"Recommended: {best.method}, which leaves {strengths or 'nothing'} of its strength.")
        elif self.no_forecast is not None and not self.has_errors:
            lines.append(f"No forecast of the merge: {self.no_forecast}")
        return lines

    @property
    def next_steps(self) -> tuple[str, ...]:
        """A command that merges the two, by a method that suits the verdicts; none if they cannot be merged."""
        paths = [shell_argument(self.path_a), shell_argument(self.path_b), shell_argument(self.path_a, "-merged")]
        different = any(finding.code == "different_base" for finding in self.findings)
        partial = any(module.low_rank_part_only for module in self.modules)
        if None in paths or self.path_a == self.path_b or self.has_errors or different or partial:
            return ()
        given = "" if self.base is None else f" --base {shell_argument(self.base)}"
        command = f"lorakit merge {' '.join(map(str, paths))}{given}"
        counts = self.total.verdicts
        if self.forecast is not None and self._chosen:
            return (f"{command}{self._merge_options(self.forecast)}",)
        if counts["conflicting"]:
            return (f"{command} --method ties --density 0.5",)
        if counts["imbalanced"] and self.total.share_a is not None and 0 < self.total.share_a < 1:
            return (f"{command} --weights {1 - self.total.share_a:.3g},{self.total.share_a:.3g}",)  # equal norms
        return (command,)

    @property
    def _chosen(self) -> bool:
        """Whether other merges were forecast than those by default."""
        expected = self.forecast
        return expected is not None and (
            expected.weights != (0.5, 0.5) or any(one.density is not None for one in expected.methods)
        )

    @staticmethod
    def _merge_options(expected: MergeForecast) -> str:
        best = expected.recommended
        parts = [] if expected.weights == (0.5, 0.5) else [" --weights={:.6g},{:.6g}".format(*expected.weights)]
        if best.method != "linear":
            parts.append(f" --method {best.method} --rank {best.rank}")
        if best.density is not None:
            parts.append(f" --density {best.density:g}")
        if best.seed:
            parts.append(f" --seed {best.seed}")
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as JSON data."""
        summary = {
            "path_a": self.path_a,
            "path_b": self.path_b,
            "peft_type_a": self.peft_type_a,
            "peft_type_b": self.peft_type_b,
            "base": self.base,
            "energy": self.energy,
            "thresholds": asdict(self.thresholds),
            "verdict": self.verdict,
            "reason": self.reason,
            "forecast": None if self.forecast is None else asdict(self.forecast) | self.forecast.summary(),
            "no_forecast": self.no_forecast,
            **{key: value for key, value in asdict(self.total).items() if key != "name"},
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "roles": [asdict(group) for group in self.roles],
            "layers": [asdict(group) for group in self.layers],
        }
        modules = [asdict(module) for module in self.modules]
        data = {"modules": modules, "summary": summary, "findings": [asdict(finding) for finding in self.findings]}
        return {key: plain(value) for key, value in data.items()}

    def tables(self) -> list[Table]:
        tables = [_role_table(self.roles, self.total), _unsafe_table(self.modules)]
        if self.forecast is not None:
            tables.insert(0, self.forecast.table())
        return [table for table in tables if table.rows and self.modules]

    def plot(self) -> Figure:
        """Heatmaps by role and layer: cosine, overlaps and A's share, with what chance gives marked in red."""
        title = f"A: {title_name(self.path_a)}\nB: {title_name(self.path_b)}"
        maps = _heatmaps([module for module in self.modules if module.verdict is not None], self.total)
        return heatmaps_figure(title, maps) if maps else message_figure(title, "no module with finite updates in both")


def summarize(name: str, rows: Sequence[ComparedModule]) -> ComparedGroup:
    """The summary of some modules."""
    finite = [row for row in rows if row.verdict is not None]
    norms_a, norms_b = _columns(finite, "frobenius_norm_a", "frobenius_norm_b")
    norm_a, norm_b = math.hypot(*norms_a), math.hypot(*norms_b)
    cosine = chance = 0.0
    if norm_a and norm_b:
        weights = [(x / norm_a) * (y / norm_b) for x, y in zip(norms_a, norms_b, strict=True)]
        cosines, chances = _columns(finite, "cosine", "random_cosine")
        cosine = math.fsum(w * c for w, c in zip(weights, cosines, strict=True))
        chance = math.hypot(*(w * c for w, c in zip(weights, chances, strict=True)))
    larger = max(norm_a, norm_b)
    return ComparedGroup(
        name=name,
        modules=len(rows),
        verdicts={verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS},
        cosine=cosine if finite else None,
        random_cosine=chance if finite else None,
        output_overlap_mean=mean(row.output_overlap for row in finite),
        random_output_overlap_mean=mean(row.random_output_overlap for row in finite),
        input_overlap_mean=mean(row.input_overlap for row in finite),
        random_input_overlap_mean=mean(row.random_input_overlap for row in finite),
        frobenius_norm_a=norm_a if finite else None,
        frobenius_norm_b=norm_b if finite else None,
        share_a=(norm_a / larger) / (norm_a / larger + norm_b / larger) if larger else None,
    )


def _columns(rows: Iterable[ComparedModule], *names: str) -> list[list[float]]:
    rows = list(rows)
    return [[getattr(row, name) for row in rows] for name in names]


def _role_table(roles: Sequence[ComparedGroup], total: ComparedGroup) -> Table:
    def overlap(name: str) -> Callable[[ComparedGroup], str]:
        return lambda g: "" if (value := getattr(g, name)) is None else f"{value:.3f}"

    def verdict(name: Verdict) -> Callable[[ComparedGroup], str]:
        return lambda g: str(g.verdicts[name])

    columns: list[tuple[str, Callable[[ComparedGroup], str]]] = [
        ("role", lambda g: g.name),
        ("n", lambda g: str(g.modules)),
        ("cosine", lambda g: "" if g.cosine is None else f"{g.cosine:+.3f}"),
        ("±chance", lambda g: "" if g.random_cosine is None else f"{g.random_cosine:.0e}"),
        ("out", overlap("output_overlap_mean")),
        ("chance", overlap("random_output_overlap_mean")),
        ("in", overlap("input_overlap_mean")),
        ("chance", overlap("random_input_overlap_mean")),
        ("A's", lambda g: share(g.share_a)),
        *((heading, verdict(name)) for heading, name in zip(("safe", "red", "conf", "imb"), VERDICTS, strict=True)),
    ]
    note = (
        "Cosine of the updates; overlaps of output and input subspaces; A's share of the norms; modules that are safe, "
        "redundant, conflicting and imbalanced."
    )
    return Table.of("", columns, [*roles, total], note=note, total=True)


def _unsafe_table(modules: Sequence[ComparedModule]) -> Table:
    """The modules with other verdicts than "safe", conflicts and large cosines first."""
    unsafe = [module for module in modules if module.verdict not in ("safe", None)]
    unsafe.sort(key=lambda m: (m.verdict != "conflicting", -abs(m.cosine or 0.0)))
    columns: list[tuple[str, Callable[[ComparedModule], str]]] = [
        ("module", lambda m: m.module_name),
        ("verdict", lambda m: f"{m.verdict} ({m.reason})"),
        ("cosine", lambda m: number(m.cosine)),
        ("σ₁ ratio", lambda m: number(m.sigma_ratio)),
    ]
    title = f"Not safe to add as they are: {len(unsafe)} modules"
    more = f"… and {len(unsafe) - _WORST} more" if len(unsafe) > _WORST else ""
    return Table.of(title, columns, unsafe[:_WORST], note=more)


def _heatmaps(modules: Sequence[ComparedModule], total: ComparedGroup) -> list[Heatmap]:
    """Cosine, overlaps and A's share, in colours that span the values and what chance gives."""
    if not modules:
        return []
    chance = total.random_cosine or 0.0
    peak = max(3 * chance, *(abs(module.cosine or 0.0) for module in modules))
    title = f"cosine of the updates: {total.cosine:+.2g} over all, by chance ±{number(chance)}"
    maps = [heatmap(title, modules, lambda m: m.cosine, colours="RdBu_r", low=-peak, high=peak)]
    for side in ("output", "input"):
        overlap, by_chance = getattr(total, f"{side}_overlap_mean"), getattr(total, f"random_{side}_overlap_mean")
        if overlap is not None:
            title = f"overlap of the {side} subspaces: {overlap:.3f} on average, by chance {by_chance:.3f} (red)"
            name = f"{side}_overlap"
            peak = max(2 * by_chance, *(getattr(module, name) or 0.0 for module in modules))
            maps.append(heatmap(title, modules, _getter(name), low=0.0, high=peak, chance=(by_chance,)))
    title = "A's share ‖ΔW_A‖_F / (‖ΔW_A‖_F + ‖ΔW_B‖_F)"
    return [*maps, heatmap(title, modules, lambda m: m.share_a, colours="RdBu_r", low=0.0, high=1.0)]


def _getter(name: str) -> Callable[[ComparedModule], float | None]:
    return lambda module: getattr(module, name)
