"""How an adapter's spectra go while it is trained: snapshots in a JSONL file, and the plot of the two phases.

Reference: "LoRA-Lens: Training Induces Spectral Compression in Low-Rank Adapters", section 2.2, Fig. 3.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._figures import new_figure
from lorakit.lens.training.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trajectory:
    """Snapshots of one training, in the order of their steps."""

    snapshots: tuple[Snapshot, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Snapshots from a JSONL file, as `SpectralCallback` writes it, one a line.

        A last line that was cut off in writing is left out. Raises: FileNotFoundError; ValueError for a file that has
        anything else in it.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        snapshots = []
        for number, line in enumerate(lines, 1):
            try:
                snapshots.append(Snapshot.from_dict(json.loads(line)))
            except ValueError as error:
                if number == len(lines) and isinstance(error, json.JSONDecodeError):
                    break
                raise ValueError(f"{path}, line {number}: {error}") from None
        return cls(tuple(sorted(snapshots, key=lambda one: -1 if one.step is None else one.step)))

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one of `Snapshot.metrics`, such as ``spectral/cu_query``, where it is there.

        Raises: ValueError for a metric that no snapshot has.
        """
        found = [(one.step or 0, values[metric]) for one in self.snapshots if metric in (values := one.metrics())]
        if not found:
            known = sorted({name for one in self.snapshots for name in one.metrics()})
            raise ValueError(f"`metric` must be one of {', '.join(known)}; got {metric!r}.")
        return [step for step, _ in found], [value for _, value in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain data as JSON has it."""
        return {"snapshots": [one.to_dict() for one in self.snapshots]}

    def plot(self) -> Figure:
        """Capacity utilization of each role against steps, beside the Q-V gap, and κ where it was watched.

        Bands are the 10th to 90th percentile over a role's modules.
        Raises: MissingExtraError without matplotlib; ValueError where there is no snapshot.
        """
        if not self.snapshots:
            raise ValueError("There is no snapshot to plot.")
        watched = any(one.total.kappa is not None for one in self.snapshots)
        panels = 3 if watched else 2
        figure = new_figure(4.6 * panels, 3.8)
        axes = figure.subplots(1, panels)
        for panel in axes:
            panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # steps
        names = list(dict.fromkeys(group.name for one in self.snapshots for group in one.roles))
        for name in names:
            steps, means, low, high = self._band(name)
            (line,) = axes[0].plot(steps, means, "o-", ms=3, label=name)
            axes[0].fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes[0].set(xlabel="step", ylabel="capacity utilization", ylim=(0, 1.02), title="CU by role")
        axes[0].legend(fontsize=8)
        gaps = [(one.step or 0, one.qv_gap) for one in self.snapshots if one.qv_gap is not None]
        axes[1].axhline(0, color="0.7", lw=1)
        axes[1].plot([step for step, _ in gaps], [gap for _, gap in gaps], "o-", ms=3, color="C3")
        axes[1].set(xlabel="step", ylabel="CU of Q − CU of V", title="Q–V gap" if gaps else "Q–V gap: no Q and V")
        if watched:
            for name in names:
                kappas = [
                    (one.step or 0, group.kappa)
                    for one in self.snapshots
                    if (group := one.role(name)) is not None and group.kappa is not None
                ]
                axes[2].plot([step for step, _ in kappas], [kappa for _, kappa in kappas], "o-", ms=3, label=name)
            axes[2].set(xlabel="step", ylabel="κ = ‖UᵀGV‖ / ‖G‖", title="Gradient in the adapter's subspaces")
            axes[2].legend(fontsize=8)
        return figure

    def _band(self, role: str) -> tuple[list[int], list[float], list[float], list[float]]:
        steps, means, low, high = [], [], [], []
        for one in self.snapshots:
            values = sorted(
                module.capacity_utilization
                for module in one.modules
                if module.group == role and module.capacity_utilization is not None
            )
            if values:
                steps.append(one.step or 0)
                means.append(sum(values) / len(values))
                low.append(values[round(0.1 * (len(values) - 1))])
                high.append(values[round(0.9 * (len(values) - 1))])
        return steps, means, low, high


def append(path: Path, snapshot: Snapshot) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(snapshot))


def begin(path: Path, step: int) -> list[Snapshot]:
    """Make a file ready for snapshots after `step`, and give those it has: what is of later steps goes, as training
    goes over them again.

    A training from step 0 begins a new file; one that is there is kept, under a name with a number.
    Raises: OSError where it cannot be written; ValueError as `Trajectory.read`.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"`path` must be that of a file, new or old; {path} is something else.")
    before: list[Snapshot] = []
    if path.exists() and step == 0:
        number = 1
        while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
    elif path.exists():
        before = [one for one in Trajectory.read(path).snapshots if one.step is not None and one.step <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(_line(one) for one in before), encoding="utf-8")
    temporary.replace(path)
    return before


def _line(snapshot: Snapshot) -> str:
    return json.dumps(snapshot.to_dict(), allow_nan=False) + "\n"
