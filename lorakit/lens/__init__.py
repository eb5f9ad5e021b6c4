"""What an adapter learned: audits, comparisons and diagnostics of adapters at rest and in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.lens._curvature import Curvature as Curvature
    from lorakit.lens._curvature import LossGap as LossGap
    from lorakit.lens.diagnostics.conditions import conditions as conditions
    from lorakit.lens.diagnostics.conditions_report import AdapterConditions as AdapterConditions
    from lorakit.lens.diagnostics.conditions_report import ConditionedGroup as ConditionedGroup
    from lorakit.lens.diagnostics.conditions_report import ConditionedModule as ConditionedModule
    from lorakit.lens.diagnostics.conditions_report import ConditionsReport as ConditionsReport
    from lorakit.lens.diagnostics.correlation import CorrelatedGroup as CorrelatedGroup
    from lorakit.lens.diagnostics.correlation import RankCorrelation as RankCorrelation
    from lorakit.lens.diagnostics.correlation import RankPair as RankPair
    from lorakit.lens.diagnostics.correlation import rank_correlation as rank_correlation
    from lorakit.lens.diagnostics.curves import EnergyCurve as EnergyCurve
    from lorakit.lens.diagnostics.curves import EnergyCurves as EnergyCurves
    from lorakit.lens.diagnostics.curves import MeanCurve as MeanCurve
    from lorakit.lens.diagnostics.curves import energy_curves as energy_curves
    from lorakit.lens.diagnostics.laws import LawFit as LawFit
    from lorakit.lens.diagnostics.laws import LawPoint as LawPoint
    from lorakit.lens.diagnostics.laws import ScalingLawReport as ScalingLawReport
    from lorakit.lens.diagnostics.laws import scaling_law as scaling_law
    from lorakit.lens.render.html import write_html as write_html
    from lorakit.lens.render.plots import write_plots as write_plots
    from lorakit.lens.static.alignment import alignment as alignment
    from lorakit.lens.static.alignment_report import AlignedGroup as AlignedGroup
    from lorakit.lens.static.alignment_report import AlignedPair as AlignedPair
    from lorakit.lens.static.alignment_report import AlignmentReport as AlignmentReport
    from lorakit.lens.static.audit import audit as audit
    from lorakit.lens.static.compare import compare as compare
    from lorakit.lens.static.comparison_report import ComparedGroup as ComparedGroup
    from lorakit.lens.static.comparison_report import ComparedModule as ComparedModule
    from lorakit.lens.static.comparison_report import ComparisonReport as ComparisonReport
    from lorakit.lens.static.forecast_report import MergeForecast as MergeForecast
    from lorakit.lens.static.forecast_report import MethodForecast as MethodForecast
    from lorakit.lens.static.groups import GroupSummary as GroupSummary
    from lorakit.lens.static.recommendation import Recommendation as Recommendation
    from lorakit.lens.static.report import AuditReport as AuditReport
    from lorakit.lens.static.spectra import AuditedModule as AuditedModule
    from lorakit.lens.static.suggestions import RankSuggestion as RankSuggestion
    from lorakit.lens.static.weights import compare_weights as compare_weights
    from lorakit.lens.static.weights_report import ComparedWeight as ComparedWeight
    from lorakit.lens.static.weights_report import ComparedWeights as ComparedWeights
    from lorakit.lens.static.weights_report import WeightsReport as WeightsReport
    from lorakit.lens.training.callback import SpectralCallback as SpectralCallback
    from lorakit.lens.training.gradients import GradientWatch as GradientWatch
    from lorakit.lens.training.gradients import watch_gradients as watch_gradients
    from lorakit.lens.training.report import TrainingReport as TrainingReport
    from lorakit.lens.training.report import TrainingRun as TrainingRun
    from lorakit.lens.training.report import training_report as training_report
    from lorakit.lens.training.snapshot import Snapshot as Snapshot
    from lorakit.lens.training.snapshot import SnapshotGroup as SnapshotGroup
    from lorakit.lens.training.snapshot import SnapshotModule as SnapshotModule
    from lorakit.lens.training.snapshot import snapshot as snapshot
    from lorakit.lens.training.trajectory import LoggedStep as LoggedStep
    from lorakit.lens.training.trajectory import Trajectory as Trajectory
else:
    __getattr__, __dir__, __all__ = attach(__name__)
