"""What `refine` tried, found and decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Table
from lorakit.evaluation import CertifiedTask
from lorakit.statistics import Verdict
from lorakit.surgery._decided_report import DecidedReport
from lorakit.surgery._edit import SurgeryReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RefineCandidate:
    """One policy at one strength: its mean score on the selection split, and that of the adapter without it."""

    policy: str
    strength: float
    score: float
    score_before: float

    @property
    def gain(self) -> float:
        """How much better the score is."""
        return self.score - self.score_before


@dataclass(frozen=True, repr=False)
class RefineReport(DecidedReport):
    """The candidates, the chosen one's verdict on certification documents, and the controls'.

    `kept` is whether the edit is in the adapter; where it is not, the adapter is bit for bit as it was, and `reasons`
    say why. `verdict` is PASS if it is kept, FAIL where the task or a guard became worse (its upper bound says so),
    else INCONCLUSIVE. `controls` are the differences of edits with the same gates on components drawn at random, and
    `p_value` is (1 + #{control ≥ edit}) / (K + 1). `task` and `guards` are None and empty where no candidate was better
    than the adapter on the selection split: then no certification document was looked at. `seconds` is what scoring
    took, and `estimated_seconds` what was said before the first candidate was scored.
    """

    model_name: str
    adapter_name: str
    kept: bool
    verdict: Verdict
    reasons: tuple[str, ...]
    policy: str
    strength: float
    alpha: float
    num_examples: int
    num_selection: int
    candidates: tuple[RefineCandidate, ...]
    task: CertifiedTask | None
    guards: tuple[CertifiedTask, ...]
    controls: tuple[float, ...]
    p_value: float | None
    seed: int
    estimated_seconds: float
    seconds: float
    edit: SurgeryReport | None = field(compare=False, metadata={"in_memory": True})

    @property
    def headline(self) -> str:
        """What was decided, and on what."""
        what = f"{self.model_name}, adapter {self.adapter_name!r}: {self.policy} at strength {self.strength:g}"
        if self.kept:
            assert self.task is not None
            return f"{what} is kept: {self.task.name} {self.task.difference:+.4f}, p = {self.p_value:.3g}"
        return f"{what} is not kept, and the adapter is as it was: {self.reasons[0]}"

    @property
    def details(self) -> tuple[str, ...]:
        """The tasks, the controls, and further reasons."""
        lines = [one.line for one in (*((self.task,) if self.task else ()), *self.guards)]
        if self.controls:
            best = max(self.controls)
            lines.append(
                f"controls: {len(self.controls)} with the same gates at random, best {best:+.4f}, mean "
                f"{sum(self.controls) / len(self.controls):+.4f}; p = {self.p_value:.3g}"
            )
        lines += self.reasons[1:]
        return (*lines, f"{len(self.candidates)} candidates, {self.num_selection} examples chose among them")

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Saving what was kept, or more documents for what could not be told."""
        if self.kept:
            return ('report.save("refined-adapter/")', "report.undo()")
        if self.task is not None and self.verdict == "INCONCLUSIVE" and self.task.documents_needed:
            return (f"score about {self.task.documents_needed} documents to tell a gain of {self.task.margin:g}",)
        return ()

    def tables(self) -> list[Table]:
        """The candidates, best first."""
        columns = [
            ("policy", lambda one: one.policy),
            ("strength", lambda one: f"{one.strength:g}"),
            ("score", lambda one: f"{one.score:.4f}"),
            ("gain", lambda one: f"{one.gain:+.4f}"),
        ]
        ranked = sorted(self.candidates, key=lambda one: -one.score)
        return [Table.of("Candidates", columns, ranked, note="Mean scores on the selection split.")]

    def rows(self) -> list[dict[str, Any]]:
        """One row a candidate."""
        rows: list[dict[str, Any]] = self.to_dict()["candidates"]
        return rows

    def plot(self) -> Figure:
        """The controls' differences as a histogram, with the edit's and its bounds."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        if self.task is not None:
            axes.hist(self.controls, bins=15, color="lightgray", edgecolor="gray", label="controls")
            axes.axvline(self.task.difference, color="C0", label=f"edit, p = {self.p_value:.3g}")
            axes.axvspan(self.task.lower, self.task.upper, color="C0", alpha=0.15)
            axes.axvline(0, color="black", linewidth=1)
            axes.legend()
        axes.set(xlabel="difference from the adapter", ylabel="controls", title=escape_mathtext(self.model_name))
        return figure
