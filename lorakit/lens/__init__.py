"""Looking at adapters. Importing this imports torch and safetensors, not PEFT or transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.lens._alignment import AlignedGroup, AlignedPair, AlignmentReport, alignment
from lorakit.lens._audit import audit
from lorakit.lens._compare import ComparedGroup, ComparedModule, ComparisonReport, compare
from lorakit.lens._gradients import GradientWatch, watch_gradients
from lorakit.lens._html import write_html
from lorakit.lens._plots import write_plots
from lorakit.lens._report import AuditedModule, AuditReport, GroupSummary
from lorakit.lens._snapshot import Snapshot, SnapshotGroup, SnapshotModule, snapshot
from lorakit.lens._suggestions import RankSuggestion
from lorakit.lens._trajectory import Trajectory
from lorakit.lens._weights import ComparedWeight, ComparedWeights, WeightsReport, compare_weights

if TYPE_CHECKING:
    from lorakit.lens._callback import SpectralCallback

__all__ = [
    "AlignedGroup",
    "AlignedPair",
    "AlignmentReport",
    "AuditReport",
    "AuditedModule",
    "ComparedGroup",
    "ComparedModule",
    "ComparedWeight",
    "ComparedWeights",
    "ComparisonReport",
    "GradientWatch",
    "GroupSummary",
    "RankSuggestion",
    "Snapshot",
    "SnapshotGroup",
    "SnapshotModule",
    "SpectralCallback",
    "Trajectory",
    "WeightsReport",
    "alignment",
    "audit",
    "compare",
    "compare_weights",
    "snapshot",
    "watch_gradients",
    "write_html",
    "write_plots",
]


def __getattr__(name: str) -> Any:
    if name == "SpectralCallback":  # a subclass of transformers' TrainerCallback
        from lorakit.lens._callback import SpectralCallback

        return SpectralCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
