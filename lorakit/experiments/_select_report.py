"""The report of a rank selection: what was measured, the ranks, and what to try next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import count
from lorakit._report import Report, Table
from lorakit.experiments._marginal_gains import MarginalGains
from lorakit.experiments._patterns import Pattern
from lorakit.experiments._select_plan import with_ranks
from lorakit.experiments._select_setup import CostEstimate
from lorakit.statistics import Interval, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import LoraConfig

ArmVerdict = Literal["confirmed", "not confirmed", "worse", "nothing to redistribute", "not done"]


@dataclass(frozen=True)
class SelectedModule:
    """One module: its Fisher information, the prior's rank, and the rank that was chosen. `cost` is d_in + d_out."""

    module_name: str
    role: str
    cost: int
    fisher: float
    prior: int
    rank: int


@dataclass(frozen=True)
class ComparedArm:
    """One way to choose ranks against another, on every set.

    `scores` are mean scores, higher is better; `against` holds the paired differences to `reference`, and `verdict`
    whether the worst set is within the tolerance. `steps` are each seed's; fewer than asked for after early stopping.
    """

    name: str
    rank: int | None
    params: int
    scores: dict[str, float]
    reference: str
    against: dict[str, Interval]
    verdict: Verdict
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Advice:
    """One step of the escalation, in its order: whether it is called for, and the measurement that says so."""

    step: str
    called_for: bool
    measurement: str


@dataclass(frozen=True, repr=False)
class RankSelection(Report):
    """Ranks by measurement, under a budget.

    `verdict` is about the uniform rank: PASS if the smallest rank within the tolerance fits the budget, FAIL if every
    rank that fits is worse than the best by more than the tolerance on some set, else INCONCLUSIVE, as always in the
    cheap mode. `redistribution` is "confirmed" if the redistributed ranks are better than uniform and shuffled ones on
    an in-domain set (lower bounds above 0, each at alpha over the number of these sets), and within the tolerance of
    uniform on every set; only then are they `ranks`. `patterns` are of each set's sweep, where differences up to the
    tolerance do not matter: unstable if a larger rank is worse than a smaller one by more than that and 2 standard
    errors, saturating if the last step adds at most that or a tenth of the whole improvement, else gradual.
    `not_checked` says what was left out.
    """

    verdict: Verdict
    rank: int | None
    budget: int
    tolerance: float
    alpha: float
    seeds: tuple[int, ...]
    in_domain: tuple[str, ...]
    shifted: tuple[str, ...]
    without_adapter: dict[str, float]
    modules: tuple[SelectedModule, ...]
    sweep: tuple[ComparedArm, ...]
    patterns: dict[str, Pattern | None]
    gains: MarginalGains | None
    confirmation: tuple[ComparedArm, ...]
    redistribution: ArmVerdict
    advice: tuple[Advice, ...]
    not_checked: tuple[str, ...]
    estimate: CostEstimate | None
    template: Any

    @property
    def ranks(self) -> dict[str, int]:
        """Each module's rank."""
        return {row.module_name: row.rank for row in self.modules}

    @property
    def params(self) -> int:
        """The parameters of these ranks, Σ rank · (d_in + d_out)."""
        return sum(row.rank * row.cost for row in self.modules)

    def to_config(self) -> LoraConfig:
        """The template with these ranks, and the template's scaling in every module."""
        config: LoraConfig = with_ranks(self.template, self.ranks)
        return config

    @property
    def headline(self) -> str:
        if self.rank is None:
            return f"prior only, {count(self.params)} of {count(self.budget)} parameters; nothing was trained"
        which = "redistributed" if self.redistribution == "confirmed" else "uniform"
        return (
            f"{self.verdict}: rank {self.rank} at a tolerance of {self.tolerance:g}; {which} ranks, "
            f"{count(self.params)} of {count(self.budget)} parameters; redistribution: {self.redistribution}"
        )

    @property
    def details(self) -> tuple[str, ...]:
        patterns = [f"{name}: {pattern or 'no pattern'}" for name, pattern in self.patterns.items()]
        return (*patterns, *(f"not checked: {what}" for what in self.not_checked))

    @property
    def next_steps(self) -> tuple[str, ...]:
        return tuple(f"# {one.step}: {one.measurement}" for one in self.advice if one.called_for)

    def to_dict(self) -> dict[str, Any]:
        """`modules`, and under `summary` all other fields but the template, with the config's fields."""
        data = super(RankSelection, replace(self, template=None, gains=None)).to_dict()
        summary = data["summary"]
        del summary["template"]
        for key in ("sweep", "confirmation"):
            for row, arm in zip(summary[key], getattr(self, key), strict=True):
                row["against"] = {name: one.to_dict() for name, one in arm.against.items()}
        config = self.to_config()
        summary |= {
            "gains": None if self.gains is None else self.gains.to_dict(),
            "params": self.params,
            "config": {name: getattr(config, name) for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")},
        }
        return data

    def tables(self) -> list[Table]:
        """The sweep, the gains, the confirmation, the advice, and each module's ranks."""
        found = [self._arms("Sweep", self.sweep), *([] if self.gains is None else self.gains.tables())]
        found.append(self._arms("At equal parameters (within 1 %)", self.confirmation))
        advice: list[tuple[str, Callable[[Advice], str]]] = [
            ("step", lambda one: one.step),
            ("called for", lambda one: "yes" if one.called_for else "no"),
            ("measurement", lambda one: one.measurement),
        ]
        modules: list[tuple[str, Callable[[SelectedModule], str]]] = [
            ("module", lambda row: row.module_name),
            ("role", lambda row: row.role),
            ("Fisher", lambda row: f"{row.fisher:.3g}"),
            ("prior", lambda row: str(row.prior)),
            ("rank", lambda row: str(row.rank)),
        ]
        found.append(Table.of("What to try next, in this order", advice, self.advice))
        found.append(Table.of("Modules", modules, self.modules, long=True))
        return [table for table in found if table.rows]

    def _arms(self, title: str, arms: tuple[ComparedArm, ...]) -> Table:
        rows = [(arm, name) for arm in arms for name in arm.scores]
        columns: list[tuple[str, Callable[[tuple[ComparedArm, str]], str]]] = [
            ("ranks", lambda row: row[0].name),
            ("parameters", lambda row: str(row[0].params)),
            ("set", lambda row: row[1]),
            ("score", lambda row: f"{row[0].scores[row[1]]:.4f}"),
            ("against", lambda row: row[0].reference),
            ("difference", lambda row: f"{row[0].against[row[1]].difference:.4f}" if row[0].against else "-"),
            ("lower", lambda row: f"{row[0].against[row[1]].lower:.4f}" if row[0].against else "-"),
            ("upper", lambda row: f"{row[0].against[row[1]].upper:.4f}" if row[0].against else "-"),
            ("verdict", lambda row: row[0].verdict),
        ]
        note = f"Bounds are one-sided, each at level {self.alpha:g}. Scores: higher is better."
        return Table.of(title, columns, rows, note=note)

    def plot(self) -> Figure:
        """Mean scores by parameters: the sweep as a line for each set, arms at equal parameters as marks."""
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        rows = sorted(self.sweep, key=lambda row: row.params)
        for i, name in enumerate((*self.in_domain, *self.shifted) if rows else ()):
            label = escape_mathtext(f"{name} ({'shifted' if name in self.shifted else 'in-domain'})")
            axes.plot([r.params for r in rows], [r.scores[name] for r in rows], "o-", color=f"C{i}", label=label)
            for arm, mark in zip(self.confirmation, "sxd^", strict=False):
                shown = escape_mathtext(arm.name) if i == 0 else None
                axes.plot([arm.params], [arm.scores[name]], mark, color=f"C{i}", mfc="none", label=shown)
        if rows:
            axes.axvline(self.budget, color="0.6", ls="--", lw=1, label="budget")
            axes.set_xscale("log", base=2)
            axes.set(xlabel="parameters", ylabel="score")
        else:
            axes.bar(range(len(self.modules)), [row.rank for row in self.modules])
            axes.set(xlabel="module", ylabel="rank of the prior", label="prior")
        if rows:
            axes.legend(fontsize=8)
        return figure
