"""What shrinking intruder directions does to a task and to base text, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit.evaluation import CertifiedTask
from lorakit.statistics import Verdict
from lorakit.surgery._decided_report import DecidedReport
from lorakit.surgery._edit import SurgeryReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FrontierPoint:
    """The intruder directions times `scale`: the task, then the guards, and base text, against the adapter as it was.

    The verdict of `base_text` at its margin is not used: only the bounds of its gain are.
    """

    scale: float
    tasks: tuple[CertifiedTask, ...]
    base_text: CertifiedTask


@dataclass(frozen=True, repr=False)
class RestoreReport(DecidedReport):
    """The frontier of the task against base text, and whether a point of it was kept, by `rule`.

    `intruders`: how many directions each module has; modules without one are not edited. Bounds of tasks are one-sided
    at `alpha`, those of base text at `alpha` divided by the number of scales. `verdict` is PASS if a point was kept,
    FAIL where the mildest one makes the task or a guard worse, else INCONCLUSIVE.
    """

    model_name: str
    adapter_name: str
    kept: bool
    verdict: Verdict
    reasons: tuple[str, ...]
    rule: str
    scale: float | None
    alpha: float
    intruders: Mapping[str, int]
    frontier: tuple[FrontierPoint, ...]
    estimated_seconds: float
    seconds: float
    edit: SurgeryReport | None = field(compare=False, metadata={"in_memory": True})

    @property
    def headline(self) -> str:
        """What was decided."""
        what = f"{self.model_name}, adapter {self.adapter_name!r}: {sum(self.intruders.values())} intruder directions"
        if self.kept:
            return f"{what} in {len(self.intruders)} modules, scaled by {self.scale:g}"
        return f"{what}; the adapter is as it was: {self.reasons[0]}"

    @property
    def details(self) -> tuple[str, ...]:
        """The frontier, and the rule."""
        lines = [f"× {p.scale:g}: {'; '.join(t.line for t in (*p.tasks, p.base_text))}" for p in self.frontier]
        return (*lines, f"rule: {self.rule}")

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Saving what was kept, and undoing it."""
        return ('report.save("restored-adapter/")', "report.undo()") if self.kept else ()

    def rows(self) -> list[dict[str, Any]]:
        """One row a scale."""
        rows = []
        for point in self.frontier:
            row: dict[str, Any] = {"scale": point.scale, "kept": point.scale == self.scale}
            for name, one in (("task", point.tasks[0]), ("base_text", point.base_text)):
                bounds = {"difference": one.difference, "lower": one.lower, "upper": one.upper}
                row |= {f"{name}_{key}": value for key, value in bounds.items()}
            rows.append(row)
        return rows

    def plot(self) -> Figure:
        """The frontier: the task's difference against base text's, with bounds."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        for point in self.frontier:
            x, y = point.base_text, point.tasks[0]
            errors: dict[str, Any] = {
                f"{n}err": [[v.difference - v.lower], [v.upper - v.difference]] for n, v in (("x", x), ("y", y))
            }
            axes.errorbar(x.difference, y.difference, **errors, fmt="o", label=f"× {point.scale:g}")
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.axvline(0, color="gray", linewidth=0.8)
        labels = {"xlabel": "base text: difference", "ylabel": "task: difference"}
        axes.set(**labels, title=escape_mathtext(self.model_name))
        if self.frontier:
            axes.legend()
        return figure
