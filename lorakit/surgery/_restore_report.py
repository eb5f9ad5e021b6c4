"""What shrinking intruder directions does to a task and to base text, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from lorakit._figures import escape_mathtext, new_figure
from lorakit.evaluation import CertifiedTask
from lorakit.naming.roles import Role
from lorakit.statistics import Verdict
from lorakit.surgery._decided_report import DecidedReport
from lorakit.surgery._edit import Backup, Edit
from lorakit.surgery._plots import Quantity, component_maps
from lorakit.surgery._report import as_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RestoredRow:
    """One module: the singular values of ΔW before and after, each in descending order.

    ΔW's component k, of singular value σ_k and singular vectors u_k and v_k, is multiplied by `gate` k: u_kᵀ ΔW′ v_k =
    gate_k σ_k. Shrinking along directions between the u_k also mixes them, so `edited_singular_values` are not the
    products.
    """

    module_name: str
    role: Role | None
    rank: int
    scaling: float
    num_intruders: int
    singular_values: list[float]
    gate: list[float]
    edited_singular_values: list[float]


@dataclass(frozen=True, repr=False)
class RestoreEdit(Edit):
    """Intruder directions that were shrunk. It can be undone and saved while the factors are as the edit left them."""

    model_name: str
    adapter_name: str
    modules: Sequence[RestoredRow]
    edit_id: str
    policy: str
    policy_parameters: dict[str, Any]
    lorakit_version: str
    _backups: list[Backup] = field(repr=False, compare=False, metadata={"in_memory": True})
    _model: PeftModel = field(repr=False, compare=False, metadata={"in_memory": True})
    _source: str | None = field(default=None, repr=False, compare=False, metadata={"in_memory": True})

    @property
    def headline(self) -> str:
        """How many directions were shrunk, and by how much."""
        count = sum(row.num_intruders for row in self.modules)
        return (
            f"{self.model_name}, adapter {self.adapter_name!r}: {count} intruder directions in {len(self.modules)} "
            f"modules, scaled by {self.policy_parameters['scale']:g}"
        )

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Python code that saves the edit, and undoes it."""
        return ('edit.save("restored-adapter/")', "edit.undo()")

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON data."""
        data: dict[str, Any] = as_plain(self)
        return data

    def plot(self) -> Figure:
        """A map of each component's gate, with one panel for each role."""
        return component_maps(self.headline, self.modules, [Quantity("gate", lambda row: row.gate, center=1.0)])


@dataclass(frozen=True)
class FrontierPoint:
    """The intruder directions times `scale`: the task, then the guards, and base text, against the adapter as it was.

    The verdict of `base_text` at its margin is not used: only the bounds of its gain are.
    """

    scale: float
    tasks: tuple[CertifiedTask, ...]
    base_text: CertifiedTask


@dataclass(frozen=True)
class RestoreControl:
    """Other components of the updates, shrunk: the scale at which base text gains most, by the gain's lower bound.

    `share` is how much of the updates lies along them, in squared Frobenius norm.
    """

    scale: float
    difference: float
    lower: float
    share: float


@dataclass(frozen=True, repr=False)
class RestoreReport(DecidedReport):
    """The frontier of the task against base text, and whether a point of it was kept, by `rule`.

    `intruders`: how many directions each module has; modules without one are not edited. `intruder_share`: how much of
    the edited modules' updates lies along them, in squared Frobenius norm; None without one. Bounds of tasks are
    one-sided at `alpha`, those of base text at `alpha` divided by the number of scales. `controls` are scored, and
    `p_value` is theirs, only where a point has passed all else. `verdict` is PASS if a point was kept, FAIL where the
    mildest one makes the task or a guard worse, else INCONCLUSIVE. `estimated_seconds` is with all controls at all
    scales.
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
    intruder_share: float | None
    frontier: tuple[FrontierPoint, ...]
    controls: tuple[RestoreControl, ...]
    p_value: float | None
    seed: int
    estimated_seconds: float
    seconds: float
    edit: RestoreEdit | None = field(compare=False, metadata={"in_memory": True})

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
        if self.controls:
            best = max(control.lower for control in self.controls)
            share = sum(control.share for control in self.controls) / len(self.controls)
            lines.append(
                f"controls: {len(self.controls)} of other components, best lower bound {best:+.4f}; p = "
                f"{self.p_value:.3g}; {share:.0%} of the updates lies along them, {self.intruder_share:.0%} along the "
                f"intruders"
            )
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
        """The frontier: the task's difference against base text's, with bounds; the controls' on base text are gray."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        for place, control in enumerate(self.controls):
            axes.axvline(control.difference, color="lightgray", zorder=0, label="" if place else "controls")
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
