"""The edits of a study, with the controls beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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
        """The policies beside the controls, and the edits, best first."""
        groups = {"random controls": list(self.controls)} | self._by_policy()
        summary: list[tuple[str, Callable[[tuple[str, list[StudiedEdit]]], str]]] = [
            ("policy", lambda group: group[0]),
            ("edits", lambda group: str(len(group[1]))),
            ("mean gain", lambda group: f"{_mean([e.gain for e in group[1]]):+.4f}"),
            ("least", lambda group: f"{min(e.gain for e in group[1]):+.4f}"),
            ("largest", lambda group: f"{max(e.gain for e in group[1]):+.4f}"),
            ("bound above 0", lambda group: str(sum(e.lower > 0 for e in group[1]))),
            *((f"mean change on {name}", _change_on(name)) for name in self.guards),
        ]
        columns: list[tuple[str, Callable[[StudiedEdit], str]]] = [
            ("policy", lambda e: e.policy),
            ("modules", lambda e: e.modules),
            ("energy", lambda e: e.energy),
            ("examples", lambda e: str(e.num_examples)),
            ("seed", lambda e: str(e.seed)),
            ("gain", lambda e: f"{e.gain:+.4f}"),
            ("lower", lambda e: f"{e.lower:+.4f}"),
            *((name, lambda e, name=name: f"{e.guard_changes[name]:+.4f}") for name in self.guards),
            ("p", lambda e: f"{self.p_value(e):.3f}"),
        ]
        ranked = sorted(self.edits, key=lambda e: -e.gain)
        return [
            Table.of("Policies", summary, groups.items(), note="Controls are draws of random_index."),
            Table.of("Edits", columns, ranked, long=len(self.edits) > 20),
        ]

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
        """Reward against risk: the gain on the task against the drop on each guard, a panel a guard.

        Controls are gray; a color is a policy, and a marker a set of modules. Without guards, each policy's gains in a
        column of its own.
        """
        panels = self.guards or (None,)
        figure = new_figure(1 + 5 * len(panels), 5)
        figure.suptitle(escape_mathtext(f"{self.model_name}, adapter {self.adapter_name!r}"), wrap=True)
        markers = dict(zip(dict.fromkeys(e.modules for e in self.edits), itertools.cycle("o^sDv"), strict=False))
        for axes, guard in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            groups = {"random controls": list(self.controls)} | self._by_policy()
            for place, (name, group) in enumerate(groups.items()):
                for modules, marker in markers.items():
                    some = [edit for edit in group if edit.modules == modules]
                    risks = [place if guard is None else -edit.guard_changes[guard] for edit in some]
                    label = name if len(markers) == 1 else f"{name}, {modules}"
                    style: dict[str, Any] = {"color": f"C{place - 1}" if place else "lightgray", "zorder": 1 + place}
                    gains = [edit.gain for edit in some]
                    axes.scatter(risks, gains, label=escape_mathtext(label), marker=marker, **style)
            axes.axhline(0, color="gray", linewidth=0.8)
            if guard is None:
                axes.set_xticks([])
            else:
                axes.axvline(0, color="gray", linewidth=0.8)
            xlabel = "policies (no guards were given)" if guard is None else f"risk: drop on {guard}"
            axes.set(xlabel=escape_mathtext(xlabel), ylabel=escape_mathtext(f"reward: gain on {self.task}"))
        axes.legend(fontsize="small")
        return figure

    def _by_policy(self) -> dict[str, list[StudiedEdit]]:
        groups: dict[str, list[StudiedEdit]] = {}
        for edit in self.edits:
            groups.setdefault(edit.policy, []).append(edit)
        return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _change_on(guard: str) -> Callable[[tuple[str, list[StudiedEdit]]], str]:
    return lambda group: f"{_mean([edit.guard_changes[guard] for edit in group[1]]):+.4f}"
