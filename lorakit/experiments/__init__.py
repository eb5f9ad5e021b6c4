"""Experiments that train or switch adapters and compare them on the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.experiments import pilot as pilot
    from lorakit.experiments._adapt_each_layer import LayerGain as LayerGain
    from lorakit.experiments._adapt_each_layer import LayerGains as LayerGains
    from lorakit.experiments._adapt_each_layer import adapt_each_layer as adapt_each_layer
    from lorakit.experiments._bench import bench as bench
    from lorakit.experiments._bench_file import read_bench_file as read_bench_file
    from lorakit.experiments._bench_file import read_methods_file as read_methods_file
    from lorakit.experiments._bench_report import BenchReport as BenchReport
    from lorakit.experiments._bench_report import BenchVariant as BenchVariant
    from lorakit.experiments._bench_report import read_bench as read_bench
    from lorakit.experiments._bench_verdicts import BenchGate as BenchGate
    from lorakit.experiments._bench_verdicts import BenchScores as BenchScores
    from lorakit.experiments._bench_verdicts import BenchTask as BenchTask
    from lorakit.experiments._compare import compare_methods as compare_methods
    from lorakit.experiments._compare_report import ComparedMethod as ComparedMethod
    from lorakit.experiments._compare_report import MethodsReport as MethodsReport
    from lorakit.experiments._compare_report import TriedRate as TriedRate
    from lorakit.experiments._compare_report import read_methods as read_methods
    from lorakit.experiments._compare_verdicts import MethodScores as MethodScores
    from lorakit.experiments._compare_verdicts import MethodTask as MethodTask
    from lorakit.experiments._compare_verdicts import MethodVerdict as MethodVerdict
    from lorakit.experiments._executors import RayExecutor as RayExecutor
    from lorakit.experiments._executors import process_pool as process_pool
    from lorakit.experiments._layer_sensitivity import LayerSensitivity as LayerSensitivity
    from lorakit.experiments._layer_sensitivity import SensitivityGroup as SensitivityGroup
    from lorakit.experiments._layer_sensitivity import layer_sensitivity as layer_sensitivity
    from lorakit.experiments._losses import MeanLoss as MeanLoss
    from lorakit.experiments._losses import PairedDifference as PairedDifference
    from lorakit.experiments._marginal_gains import GroupGain as GroupGain
    from lorakit.experiments._marginal_gains import MarginalGains as MarginalGains
    from lorakit.experiments._marginal_gains import marginal_gains as marginal_gains
    from lorakit.experiments._plan import PlanResults as PlanResults
    from lorakit.experiments._plan import Trial as Trial
    from lorakit.experiments._plan import run_plan as run_plan
    from lorakit.experiments._rank_sweep import RankSweep as RankSweep
    from lorakit.experiments._rank_sweep import SweptRank as SweptRank
    from lorakit.experiments._rank_sweep import rank_sweep as rank_sweep
    from lorakit.experiments._select_ranks import select_ranks as select_ranks
    from lorakit.experiments._select_report import Advice as Advice
    from lorakit.experiments._select_report import ComparedArm as ComparedArm
    from lorakit.experiments._select_report import RankSelection as RankSelection
    from lorakit.experiments._select_report import SelectedModule as SelectedModule
    from lorakit.experiments._select_setup import CostEstimate as CostEstimate
    from lorakit.experiments._stages import UnfinishedBench as UnfinishedBench
    from lorakit.experiments._training import SweepRun as SweepRun
else:
    __getattr__, __dir__, __all__ = attach(__name__)
