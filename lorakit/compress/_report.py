"""What `truncate` reports."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit._format import size
from lorakit.naming.roles import Role
from lorakit.serving._written import WrittenReport, plot_energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CompressedModule:
    """One module before and after.

    `kept_rank` is the rank without padding; `parameters` are as written, with it. `energy_kept` is ‖ΔŴ‖_F² / ‖ΔW‖_F²,
    and `weighted_energy_kept` the same of ΔW C^½ where inputs were given; 1 where ΔW = 0. `error` is
    ‖written − ΔŴ‖_F / ‖ΔŴ‖_F, from the rounding of what is stored; None where nothing was verified.

    With `whole_update`, ΔW includes what DoRA or a mask changes, so `kept_rank` may exceed `rank`. A stack of
    `experts` is one module: each expert is cut to `kept_rank`, and energies and errors are of all of them together.
    """

    module_name: str
    role: Role | None
    layer: int | None
    rank: int
    kept_rank: int
    parameters: int
    energy_kept: float
    weighted_energy_kept: float | None
    low_rank_part_only: bool
    error: float | None
    experts: int | None = None
    whole_update: bool = False


@dataclass(frozen=True, repr=False)
class CompressReport(WrittenReport):
    """What `truncate` wrote; the energies are of all modules together, Σ ‖·‖_F²."""

    source: str
    criterion: str
    energy_kept: float
    weighted_energy_kept: float | None
    verified: bool
    modules: tuple[CompressedModule, ...]

    @property
    def headline(self) -> str:
        return (
            f"{self.source} → {self.path}: rank {self.rank_before} → {self.r}, {size(self.size_bytes_before)} → "
            f"{size(self.size_bytes)}, {self.energy_kept:.2%} of the energy kept"
        )

    @property
    def next_steps(self) -> tuple[str, ...]:
        if not Path(self.source).exists() or self.source == self.path:
            return super().next_steps
        return (f"lorakit compare {shlex.quote(self.source)} {shlex.quote(self.path)}", *super().next_steps)

    def plot(self) -> Figure:
        """The share of each module's energy that was kept."""
        return plot_energy(self, {row.module_name: row.energy_kept for row in self.modules})
