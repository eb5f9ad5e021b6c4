"""Looking at adapters. Importing this imports torch and safetensors, not PEFT or transformers."""

from __future__ import annotations

import importlib
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
    from lorakit.lens._accounting import AccountedModule, Accounting, Flops, Memory, accounting
    from lorakit.lens._callback import SpectralCallback
    from lorakit.lens._conditions import (
        AdapterConditions,
        ConditionedGroup,
        ConditionedModule,
        ConditionsReport,
        conditions,
    )
    from lorakit.lens._correlation import CorrelatedGroup, RankCorrelation, RankPair, rank_correlation
    from lorakit.lens._curves import EnergyCurve, EnergyCurves, MeanCurve, energy_curves
    from lorakit.lens._evaluation import MeanLoss
    from lorakit.lens._gains import LayerGain, LayerGains, adapt_each_layer
    from lorakit.lens._laws import LawFit, LawPoint, ScalingLawReport, scaling_law
    from lorakit.lens._sensitivity import LayerSensitivity, SensitivityGroup, layer_sensitivity
    from lorakit.lens._sweep import PairedDifference, RankSweep, SweepRun, SweptRank, rank_sweep

__all__ = [
    "AccountedModule",
    "Accounting",
    "AdapterConditions",
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
    "ConditionedGroup",
    "ConditionedModule",
    "ConditionsReport",
    "CorrelatedGroup",
    "EnergyCurve",
    "EnergyCurves",
    "Flops",
    "GradientWatch",
    "GroupSummary",
    "LawFit",
    "LawPoint",
    "LayerGain",
    "LayerGains",
    "LayerSensitivity",
    "MeanCurve",
    "MeanLoss",
    "Memory",
    "PairedDifference",
    "RankCorrelation",
    "RankPair",
    "RankSuggestion",
    "RankSweep",
    "ScalingLawReport",
    "SensitivityGroup",
    "Snapshot",
    "SnapshotGroup",
    "SnapshotModule",
    "SpectralCallback",
    "SweepRun",
    "SweptRank",
    "Trajectory",
    "WeightsReport",
    "accounting",
    "adapt_each_layer",
    "alignment",
    "audit",
    "compare",
    "compare_weights",
    "conditions",
    "energy_curves",
    "layer_sensitivity",
    "rank_correlation",
    "rank_sweep",
    "scaling_law",
    "snapshot",
    "watch_gradients",
    "write_html",
    "write_plots",
]

_LAZY = {
    "_accounting": ("AccountedModule", "Accounting", "Flops", "Memory", "accounting"),
    "_callback": ("SpectralCallback",),  # a subclass of transformers' TrainerCallback
    "_conditions": ("AdapterConditions", "ConditionedGroup", "ConditionedModule", "ConditionsReport", "conditions"),
    "_correlation": ("CorrelatedGroup", "RankCorrelation", "RankPair", "rank_correlation"),
    "_curves": ("EnergyCurve", "EnergyCurves", "MeanCurve", "energy_curves"),
    "_evaluation": ("MeanLoss",),
    "_gains": ("LayerGain", "LayerGains", "adapt_each_layer"),
    "_laws": ("LawFit", "LawPoint", "ScalingLawReport", "scaling_law"),
    "_sensitivity": ("LayerSensitivity", "SensitivityGroup", "layer_sensitivity"),
    "_sweep": ("PairedDifference", "RankSweep", "SweepRun", "SweptRank", "rank_sweep"),
}
_OWNERS = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_OWNERS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
