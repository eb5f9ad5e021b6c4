"""What a bench reports: the gate, the variants with their verdicts, and the scores that these rest on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorakit._figures import message_figure
from lorakit._format import count, extent, size
from lorakit._report import Table
from lorakit.errors import EvaluationError, Finding
from lorakit.experiments._bench_verdicts import BenchGate, BenchScores, BenchTask, gates, judge, overall
from lorakit.experiments._signed_report import (
    DrawnDifference,
    SignedReport,
    difference_panels,
    draw_differences,
    read_signed,
    same_figures,
)
from lorakit.statistics import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["retrained", "truncated"]


@dataclass(frozen=True)
class BenchVariant:
    """Adapters of lower rank, one for each seed: trained anew at suggested ranks, or the probe's cut to them.

    `policies` are those that suggest these ranks. `verdict` and the p-values are Holm's, over all variants.
    `parameters` and `size_bytes` are of one adapter as it is written, each module at its own rank; `served_rank` is
    the size to which servers with one rank for all modules fill it up. `energy_kept` is the mean over seeds of the
    share of Σ ‖ΔW‖_F² of the probe; None for what was trained anew. `headline` is the task nearest its margin.
    """

    name: str
    method: Method
    policies: tuple[str, ...]
    ranks: Mapping[str, int]
    parameters: int
    size_bytes: int
    served_rank: int
    energy_kept: float | None
    adapters: tuple[str, ...]
    verdict: Verdict
    pass_p_value: float
    fail_p_value: float
    headline: str
    tasks: tuple[BenchTask, ...]

    @property
    def task(self) -> BenchTask:
        """The result on the task nearest its margin."""
        return next(task for task in self.tasks if task.name == self.headline)

    @property
    def within_tolerance(self) -> bool | None:
        """Gradience's policy on every task; None without a tolerance."""
        found = [task.within_tolerance for task in self.tasks]
        return None if None in found else all(found)


@dataclass(frozen=True, repr=False)
class BenchReport(SignedReport):
    """What `lorakit.experiments.bench` found.

    `verdict` is PASS where a variant PASSes, FAIL where all of them FAIL, else INCONCLUSIVE; also where the probe does
    not pass the gate, when there are no variants. `probe` says how large the probes are, and where they lie. `sha256`
    is of everything else.
    """

    _kind = "bench"
    _format = "lorakit-bench-1"
    _file = "bench.json"

    verdict: Verdict
    base: str
    seeds: tuple[int, ...]
    alpha: float
    tolerance: float | None
    gate: tuple[BenchGate, ...]
    probe: Mapping[str, Any]
    variants: tuple[BenchVariant, ...]
    findings: tuple[Finding, ...]
    settings: Mapping[str, Any]
    hashes: Mapping[str, Any]
    environment: Mapping[str, Any]
    created: str
    scores: BenchScores
    sha256: str = ""

    @property
    def passed_gate(self) -> bool:
        """Whether the probe is good enough to be worth compressing."""
        return all(row.passed for row in self.gate)

    @property
    def recommended(self) -> BenchVariant | None:
        """The PASSing variant within the tolerance with the fewest parameters, then the best bound; or None."""
        passing = [v for v in self.variants if v.verdict == "PASS" and v.within_tolerance is not False]
        return min(passing, key=lambda variant: (variant.parameters, -variant.task.lower), default=None)

    @property
    def title(self) -> str:
        return f"Bench of {self.base}"

    @property
    def headline(self) -> str:
        """The result in one line."""
        if not self.passed_gate:
            row = next(row for row in self.gate if not row.passed)
            return (
                f"Stopped at the gate: the probe gains {row.gain:+.4f} on {row.task} (lower bound {row.lower:+.4f}), "
                f"which must exceed {row.minimum:g}. It is not worth compressing."
            )
        best = self.recommended
        if best is None:
            return f"{self.verdict}: none of {len(self.variants)} variants is shown to be as good as the probe."
        saved = 1 - best.parameters / self.probe["parameters"]
        return (
            f"PASS: {best.name} has {saved:.0%} fewer parameters than the probe, {best.task.name} "
            f"{best.task.difference:+.4f} (lower bound {best.task.lower:+.4f}) at margin {best.task.margin:g}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        """The gate, a line a task, and how the bounds are made."""
        rank = extent(self.probe["rank_range"])
        lines = [
            f"probe: r {rank}, {count(self.probe['parameters'])} parameters, {size(self.probe['size_bytes'])}, seeds "
            f"{', '.join(map(str, self.seeds))}"
        ]
        lines += [
            f"gate, {row.task}: base {row.base_mean:.4f} → probe {row.probe_mean:.4f}, gain {row.gain:+.4f} (lower "
            f"{row.lower:+.4f}) against a minimum of {row.minimum:g}: {'passed' if row.passed else 'not passed'}"
            for row in self.gate
        ]
        lines.append(f"bounds: one-sided, each at level {self.alpha:g}, over seeds and documents; verdicts: Holm's")
        return tuple(lines)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do with the result."""
        if not self.passed_gate:
            return ("# train the probe longer, at another learning rate, or on more data",)
        best = self.recommended
        if best is not None:
            return (f"lorakit servable {shlex.quote(best.adapters[0])}",)
        if self.verdict == "FAIL":
            return ("# raise `energy`, so that higher ranks are suggested",)
        tasks = [task for variant in self.variants if variant.verdict == "INCONCLUSIVE" for task in variant.tasks]
        needed = max((task.documents_needed or 0 for task in tasks), default=0)
        if needed > min((task.documents for task in tasks), default=needed):
            return (f"# evaluate on {needed} documents for a verdict at this margin",)
        return ("# take more seeds and documents",)

    def rows(self) -> list[dict[str, Any]]:
        """One row a variant and task."""
        left_out = ("tasks", "ranks", "adapters", "policies", "headline", "verdict")
        return [
            {
                **{key: value for key, value in asdict(variant).items() if key not in left_out},
                "policies": ", ".join(variant.policies),
                "verdict": variant.verdict,
                "task": task.name,
                **{key: value for key, value in asdict(task).items() if key not in ("name", "verdict")},
                "task_verdict": task.verdict,
            }
            for variant in self.variants
            for task in variant.tasks
        ]

    def tables(self) -> list[Table]:
        """One row a variant, on the task nearest its margin; then one a variant and task, and the ranks."""
        tasks = sorted({variant.headline for variant in self.variants})
        note = f"diff: variant − probe on {' or '.join(tasks)}, paired by seed and document, with one-sided bounds. "
        note += f"verdict: after Holm's adjustment over {len(self.variants)} variants, so stricter than these bounds. "
        note += "worst: the worst seed."
        note += "" if self.tolerance is None else f" policy: no seed is more than {self.tolerance:g} worse."
        sizes = (
            "One adapter as it is written, each module at its own rank. served as: the one rank to which most servers "
        )
        sizes += "need it padded. energy: what the cut keeps of the probe."
        found = [
            Table.of("", _COLUMNS, [(variant, variant.task) for variant in self.variants], note=note),
            Table.of("Sizes", _SIZE_COLUMNS, self.variants, note=sizes),
        ]
        if len(self.gate) > 1:
            columns = [_COLUMNS[0], ("task", lambda cell: cell[1].name), *_COLUMNS[1:-1], _TASK_VERDICT]
            each = [(variant, task) for variant in self.variants for task in variant.tasks]
            found.append(Table.of("Every task", columns, each, long=True))
        modules = list(self.variants[0].ranks) if self.variants else []
        columns = [("module", str), *((v.name, _rank_in(v)) for v in self.variants)]
        found.append(Table.of("Ranks", columns, modules, long=True))
        return [table for table in found if table.rows]

    def plot(self) -> Figure:
        """Each variant's difference with its bounds and seeds, beside the margin: one panel a task."""
        if not self.variants:
            return message_figure("Bench", "stopped at the gate: no variant was made")
        figure, panels = difference_panels(len(self.variants[0].tasks), len(self.variants))
        for place, (axes, first) in enumerate(zip(panels, self.variants[0].tasks, strict=True)):
            rows = [_drawn(variant, variant.tasks[place]) for variant in self.variants]
            draw_differences(axes, rows, first.margin, title=first.name, of="variant − probe")
        return figure

    def verify(self) -> None:
        """Compute the hash, the gate and every verdict anew from the scores.

        Raises: EvaluationError where one of them is not what the report says.
        """
        self._check_signature()
        minimum, margins = self.settings["gate"], self.settings["margins"]
        again = judge(self.scores, margins, self.alpha, self.tolerance)
        gate = gates(self.scores, minimum, self.alpha)
        stated = {v.name: _figures(v.verdict, v.headline, v.tasks) for v in self.variants}
        computed = {name: _figures(one.verdict, one.headline, one.tasks) for name, one in again.items()}
        verdict = overall(gate, [one.verdict for one in again.values()])
        for what, one, other in (
            ("gate", [asdict(row) for row in self.gate], [asdict(row) for row in gate]),
            ("variants", stated, computed),
            ("verdict", self.verdict, verdict),
        ):
            if not same_figures(one, other):
                raise EvaluationError(f"The bench does not verify: its {what} are not those of its scores.")


def read_bench(path: str | os.PathLike[str]) -> BenchReport:
    """A report from its `bench.json`; not verified.

    Raises: EvaluationError where the file is none.
    """
    return read_signed(path, BenchReport, _report)


def _report(content: dict[str, Any]) -> BenchReport:
    return BenchReport(
        **content
        | {
            "gate": tuple(BenchGate(**row) for row in content["gate"]),
            "variants": tuple(_variant(row) for row in content["variants"]),
            "scores": BenchScores(**content["scores"]),
        }
    )


def _variant(row: dict[str, Any]) -> BenchVariant:
    tasks = tuple(BenchTask(**task | {"seed_differences": tuple(task["seed_differences"])}) for task in row["tasks"])
    lists = {name: tuple(row[name]) for name in ("policies", "adapters")}
    return BenchVariant(**row | lists | {"tasks": tasks})


def _figures(verdict: str, headline: str, tasks: tuple[BenchTask, ...]) -> list[Any]:
    return [verdict, headline, [asdict(task) for task in tasks]]


def _drawn(variant: BenchVariant, task: BenchTask) -> DrawnDifference:
    label = f"{variant.name}, {count(variant.parameters)}: {variant.verdict}"
    color = _COLORS[variant.verdict]
    return DrawnDifference(label, color, task.difference, task.lower, task.upper, task.seed_differences)


def _rank_in(variant: BenchVariant) -> Any:
    return lambda module: str(variant.ranks[module])


def _ranks(variant: BenchVariant) -> str:
    return extent((min(variant.ranks.values()), max(variant.ranks.values())))


_COLORS = {"PASS": "#2a7f3f", "FAIL": "#b00020", "INCONCLUSIVE": "#8a5a00"}
_TASK_VERDICT: tuple[str, Any] = ("verdict", lambda cell: cell[1].verdict)
_COLUMNS: list[tuple[str, Any]] = [
    ("variant", lambda cell: cell[0].name),
    ("ranks", lambda cell: _ranks(cell[0])),
    ("params", lambda cell: count(cell[0].parameters)),
    ("diff", lambda cell: f"{cell[1].difference:+.4f}"),
    ("lower", lambda cell: f"{cell[1].lower:+.4f}"),
    ("upper", lambda cell: f"{cell[1].upper:+.4f}"),
    ("worst", lambda cell: f"{cell[1].worst_seed_difference:+.4f}"),
    ("policy", lambda cell: {None: "", True: "kept", False: "broken"}[cell[1].within_tolerance]),
    ("verdict", lambda cell: cell[0].verdict),
]
_SIZE_COLUMNS: list[tuple[str, Any]] = [
    ("variant", lambda variant: variant.name),
    ("ranks", lambda variant: _ranks(variant)),
    ("params", lambda variant: count(variant.parameters)),
    ("size", lambda variant: size(variant.size_bytes)),
    ("served as", lambda variant: str(variant.served_rank)),
    ("energy", lambda variant: "" if variant.energy_kept is None else f"{variant.energy_kept:.1%}"),
]
