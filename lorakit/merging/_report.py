"""What `merge` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit._format import size
from lorakit.naming.roles import Role
from lorakit.serving._written import WrittenReport, plot_energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.merging._retention import TaskRetention


@dataclass(frozen=True)
class MergedModule:
    """One module of a merge. `sources` is how many of the adapters adapt it.

    `rank` is that of the merge before it is cut to `kept_rank`, which is without padding; `parameters` are as written,
    with it. `energy_kept` is the share of the merge's ‖ΔW‖_F² that the cut keeps (1 where ΔW = 0). `error` is
    ‖written − meant‖_F / ‖meant‖_F; None where nothing was verified. A stack of `experts` is one module: each expert
    is merged by itself, and ranks are those of each.
    """

    module_name: str
    role: Role | None
    layer: int | None
    sources: int
    rank: int
    kept_rank: int
    parameters: int
    energy_kept: float
    error: float | None
    experts: int | None = None


@dataclass(frozen=True, repr=False)
class MergeReport(WrittenReport):
    """What `merge` wrote; `energy_kept` is of all modules together, Σ ‖ΔW‖_F².

    What was before are the sums of all adapters, and the largest of their ranks. `retention`: what is kept of each
    task that was measured.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    density: float | None
    seed: int | None
    energy_kept: float
    verified: bool
    modules: tuple[MergedModule, ...]
    retention: tuple[TaskRetention, ...] = ()

    @property
    def headline(self) -> str:
        terms = " + ".join(
            f"{weight:.4g} · {source}" for weight, source in zip(self.weights, self.sources, strict=True)
        )
        return (
            f"{self.method} of {terms} → {self.path}: rank {self.r}, {size(self.size_bytes)}, "
            f"{self.energy_kept:.2%} of the merge's energy kept"
        )

    @property
    def details(self) -> tuple[str, ...]:
        return (*(row.line for row in self.retention), *super().details)

    def plot(self) -> Figure:
        """The share of each module's energy that was kept."""
        return plot_energy(self, {row.module_name: row.energy_kept for row in self.modules})
