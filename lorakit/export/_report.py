"""What `to_lora` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit._format import size
from lorakit.serving._written import WrittenReport, plot_energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ExportedModule:
    """One module of an export; `discarded_energy` is the share of ‖ΔW‖_F² that the truncation left out.

    `rank` is the rank without padding, `source_rank` that of the adapter's own factors, without a mask.
    """

    module_name: str
    rank: int
    source_rank: int
    parameters: int
    discarded_energy: float


@dataclass(frozen=True, repr=False)
class ExportReport(WrittenReport):
    """What `to_lora` wrote; `discarded_energy` is the share of Σ ‖ΔW‖_F² that is not in the files."""

    source: str
    discarded_energy: float
    modules: tuple[ExportedModule, ...]

    @property
    def headline(self) -> str:
        return (
            f"{self.source} → {self.path}: a plain LoRA of rank {self.r}, {size(self.size_bytes)}, "
            f"{self.discarded_energy:.2%} of the energy left out"
        )

    def plot(self) -> Figure:
        """The share of each module's energy that was kept."""
        return plot_energy(self, {row.module_name: 1 - row.discarded_energy for row in self.modules})
