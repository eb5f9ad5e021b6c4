"""The edits of a study, with the controls beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report, Table
from lorakit.statistics import control_p_value
from lorakit.surgery._report import as_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StudiedEdit:
    """One edit: its mean score on the task, the gain over the adapter with one-sided bounds, and the guards' changes.

    `examples` are the places, in the calibration pass, of the examples that it calibrated on.
    """

    policy: str
    seed: int
    num_examples: int
    modules: str
    energy: str
    control: bool
    examples: tuple[int, ...]
    score: float
    gain: float
    lower: float
    upper: float
    guard_changes: Mapping[str, float]

    @property
    def mean_guard_change(self) -> float | None:
        """The mean of the guards' changes; None without guards."""
        changes = list(self.guard_changes.values())
        return sum(changes) / len(changes) if changes else None


@dataclass(frozen=True, repr=False)
class StudyReport(Report):
    """Edits and controls of one adapter, on one task and its guards. Scores are higher is better.

    The best of many edits is better than most controls by chance alone: use `refine` to decide on one.
    """

    model_name: str
    adapter_name: str
    task: str
    guards: tuple[str, ...]
    alpha: float
    edits: tuple[StudiedEdit, ...]
    controls: tuple[StudiedEdit, ...]
    estimated_seconds: float
    seconds: float

    def controls_of(self, edit: StudiedEdit) -> tuple[StudiedEdit, ...]:
        """The controls with the edit's modules and energy."""
        return tuple(c for c in self.controls if (c.modules, c.energy) == (edit.modules, edit.energy))

    def p_value(self, edit: StudiedEdit) -> float:
        """(1 + #{control ≥ edit}) / (K + 1) among its controls; for this edit alone, not for the best of several."""
        return control_p_value(edit.gain, [control.gain for control in self.controls_of(edit)])

    @property
    def headline(self) -> str:
        """The range of the gains, and that of the controls."""
        gains, chance = [e.gain for e in self.edits], [c.gain for c in self.controls]
        return (
            f"{self.model_name}, adapter {self.adapter_name!r}: {len(gains)} edits gain {min(gains):+.4f} to "
            f"{max(gains):+.4f} on {self.task}, {len(chance)} random controls {min(chance):+.4f} to {max(chance):+.4f}"
        )

    @property
    def details(self) -> tuple[str, ...]:
        """How many edits have a lower bound above 0, and what the best of many means."""
        better = sum(edit.lower > 0 for edit in self.edits)
        return (
            f"{better} of {len(self.edits)} edits have a gain with a lower bound above 0, each bound at {self.alpha:g}",
            "the best of many edits says little: `lorakit.surgery.refine` decides on documents that did not choose it",
        )

    def tables(self) -> list[Table]:
        """The edits, best first."""
        columns = [
            ("policy", lambda e: e.policy),
            ("modules", lambda e: e.modules),
            ("energy", lambda e: e.energy),
            ("examples", lambda e: str(e.num_examples)),
            ("seed", lambda e: str(e.seed)),
            ("gain", lambda e: f"{e.gain:+.4f}"),
            ("lower", lambda e: f"{e.lower:+.4f}"),
            ("guards", lambda e: "" if e.mean_guard_change is None else f"{e.mean_guard_change:+.4f}"),
            ("p", lambda e: f"{self.p_value(e):.3f}"),
        ]
        return [Table.of("Edits", columns, sorted(self.edits, key=lambda e: -e.gain), long=len(self.edits) > 20)]

    def rows(self) -> list[dict[str, Any]]:
        """One row an edit and control, with a column for each guard."""
        rows = []
        for one in (*self.edits, *self.controls):
            row = {key: value for key, value in as_plain(one).items() if key not in ("examples", "guard_changes")}
            rows.append(row | {f"change on {name}": change for name, change in one.guard_changes.items()})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        data: dict[str, Any] = as_plain(self)
        return data

    def plot(self) -> Figure:
        """Reward against risk: gain on the task against the mean change on the guards; controls are gray.

        Without guards, each policy's gains in a column of its own.
        """
        figure = new_figure(6, 5)
        axes = figure.subplots()
        groups: dict[str, list[StudiedEdit]] = {"random controls": list(self.controls)}
        for edit in self.edits:
            groups.setdefault(edit.policy, []).append(edit)
        for place, (name, group) in enumerate(groups.items()):
            style: dict[str, Any] = {"color": "lightgray", "zorder": 1} if group[0].control else {"zorder": 2}
            risks = [place if one.mean_guard_change is None else one.mean_guard_change for one in group]
            axes.scatter(risks, [one.gain for one in group], label=escape_mathtext(name), **style)
        axes.axhline(0, color="gray", linewidth=0.8)
        if self.guards:
            axes.axvline(0, color="gray", linewidth=0.8)
        else:
            axes.set_xticks([])
        xlabel = "mean change on the guards" if self.guards else "policies (no guards were given)"
        axes.set(xlabel=xlabel, ylabel=escape_mathtext(f"gain on {self.task}"))
        axes.set_title(escape_mathtext(f"{self.model_name}, adapter {self.adapter_name!r}"))
        axes.legend()
        return figure
