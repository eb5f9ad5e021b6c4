"""The public names of every package, and where each one is defined.

A package's `__init__` calls `attach`, so that importing the package imports none of its files: a name is imported when
it is first used. What type checkers see stands beside that call, under TYPE_CHECKING; a test keeps the two equal.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

# package → file → public names; a file that is itself public has no names.
_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "lorakit": {
        "_version": ("__version__",),
        "tuners.speclora": ("SpecLoRAConfig", "SpecLoRAModel"),
        "tuners.fisherlora": ("FisherLoRAConfig", "FisherLoRAModel"),
        "adapters": (),
        "allocation": (),
        "calibration": (),
        "compress": (),
        "cost": (),
        "data": (),
        "demo": (),
        "errors": (),
        "evaluation": (),
        "experiments": (),
        "export": (),
        "fisher": (),
        "fleet": (),
        "lens": (),
        "merging": (),
        "naming": (),
        "serving": (),
        "spectral": (),
        "statistics": (),
        "surgery": (),
        "tuners": (),
    },
    "lorakit.adapters": {
        "adapter": ("Adapter", "AdapterModule", "ExtraTensor", "TensorInfo"),
        "open": ("open_adapter", "open_saved_adapter"),
    },
    "lorakit.allocation": {
        "budget": ("Unit", "read_budget"),
        "report": ("RULES", "AllocatedModule", "Allocation", "Per", "Rule"),
        "masks": ("AllocatedMask", "MaskAllocation", "allocate_masks", "shuffled"),
        "probed": (
            "MaskProbeReport",
            "ProbeReport",
            "Probed",
            "ProbedMask",
            "ProbedMaskStep",
            "ProbedModule",
            "masks_from_probe",
            "ranks_from_probe",
        ),
        "rules": ("allocate",),
    },
    "lorakit.calibration": {
        "losses": ("IGNORED_LABEL", "LossFn"),
        "run": ("Probe", "collect"),
        "tally": ("Collected",),
    },
    "lorakit.compress": {
        "_heal": ("Healed",),
        "_report": ("CompressReport", "CompressedModule"),
        "_smallest": ("smallest",),
        "ladder": ("SmallestReport", "SmallestStep"),
        "_truncate": ("truncate",),
    },
    "lorakit.cost": {
        "_accounting": ("accounting",),
        "_report": ("AccountedModule", "Accounting", "Flops", "Memory"),
    },
    "lorakit.data": {
        "_loader": ("DataReport", "ExampleLoader", "as_loader", "loader"),
        "_tokenizer": ("tokenizer_for",),
    },
    "lorakit.demo": {
        "_data": ("passages", "split_documents"),
        "_model": ("load_model",),
        "_report": ("DemoReport", "DemoRow"),
        "_run": ("run_demo",),
        "_settings": ("DemoError", "DemoSettings"),
    },
    "lorakit.evaluation": {
        "_agreement": ("Agreement", "DocumentAgreement", "Estimate", "agreement", "agreement_task"),
        "_attach": ("load_adapted",),
        "_certificate": ("Certificate", "read_certificate"),
        "_certified_task": ("CertifiedTask",),
        "_certify": ("CertificationPlan", "certify", "evaluate_adapters"),
        "_classification": ("classification",),
        "_digests": ("document_hashes",),
        "_evaluate": ("evaluate",),
        "_hub": ("push_to_hub",),
        "_models": ("LoadOptions", "load_base"),
        "_scores": ("Scores", "compare", "paired_interval"),
        "_task_kinds": ("Task",),
        "_tasks": ("choices", "exact_match", "function", "lm_eval", "loss"),
        "_written": ("write_certified",),
    },
    "lorakit.experiments": {
        "_adapt_each_layer": ("LayerGain", "LayerGains", "adapt_each_layer"),
        "_bench": ("bench",),
        "_bench_file": ("read_bench_file", "read_methods_file"),
        "_bench_report": ("BenchReport", "BenchVariant", "read_bench"),
        "_bench_verdicts": ("BenchGate", "BenchScores", "BenchTask"),
        "_compare": ("compare_methods",),
        "_compare_report": ("ComparedMethod", "MethodsReport", "TriedRate", "read_methods"),
        "_compare_verdicts": ("MethodScores", "MethodTask", "MethodVerdict"),
        "_executors": ("RayExecutor", "process_pool"),
        "_layer_sensitivity": ("LayerSensitivity", "SensitivityGroup", "layer_sensitivity"),
        "_losses": ("MeanLoss", "PairedDifference"),
        "_marginal_gains": ("GroupGain", "MarginalGains", "marginal_gains"),
        "_plan": ("PlanResults", "Trial", "run_plan"),
        "_rank_sweep": ("RankSweep", "SweptRank", "rank_sweep"),
        "_select_ranks": ("select_ranks",),
        "_select_report": ("Advice", "ComparedArm", "RankSelection", "SelectedModule"),
        "_select_setup": ("CostEstimate",),
        "_stages": ("UnfinishedBench",),
        "_training": ("SweepRun",),
        "pilot": (),
    },
    "lorakit.experiments.pilot": {
        "_gradient_subspace": ("GradientSketch", "GradientSubspaces", "gradient_subspaces"),
        "_hessian": ("HessianPair", "HessianSpectrum", "hessian_spectrum"),
        "_update_spectra": ("UpdateSpectra", "UpdateSpectrum", "update_spectra"),
    },
    "lorakit.export": {"_report": ("ExportReport", "ExportedModule"), "_to_lora": ("to_lora",)},
    "lorakit.fisher": {
        "_probe": ("probe",),
        "_report": ("Estimate", "FisherGroup", "FisherReport", "FisherRow", "MaskStep", "Moments"),
    },
    "lorakit.fleet": {
        "_audit": ("audit",),
        "_duplicates": ("Duplicate", "DuplicateGroup"),
        "_report": ("FleetReport",),
        "_rows": ("FleetAdapter", "FleetFinding"),
        "_written": ("write_csv", "write_parquet", "write_sarif"),
    },
    "lorakit.lens": {
        "_curvature": ("Curvature", "LossGap"),
        "static.audit": ("audit",),
        "static.report": ("AuditReport",),
        "static.spectra": ("AuditedModule",),
        "static.groups": ("GroupSummary",),
        "static.suggestions": ("RankSuggestion",),
        "static.recommendation": ("Recommendation",),
        "static.compare": ("compare",),
        "static.comparison_report": ("ComparedGroup", "ComparedModule", "ComparisonReport"),
        "static.forecast_report": ("MergeForecast", "MethodForecast"),
        "static.alignment": ("alignment",),
        "static.alignment_report": ("AlignedGroup", "AlignedPair", "AlignmentReport"),
        "static.weights": ("compare_weights",),
        "static.weights_report": ("ComparedWeight", "ComparedWeights", "WeightsReport"),
        "diagnostics.conditions": ("conditions",),
        "diagnostics.conditions_report": (
            "AdapterConditions",
            "ConditionedGroup",
            "ConditionedModule",
            "ConditionsReport",
        ),
        "diagnostics.correlation": ("CorrelatedGroup", "RankCorrelation", "RankPair", "rank_correlation"),
        "diagnostics.curves": ("EnergyCurve", "EnergyCurves", "MeanCurve", "energy_curves"),
        "diagnostics.laws": ("LawFit", "LawPoint", "ScalingLawReport", "scaling_law"),
        "training.callback": ("SpectralCallback",),
        "training.gradients": ("GradientWatch", "watch_gradients"),
        "training.report": ("TrainingReport", "TrainingRun", "training_report"),
        "training.snapshot": ("Snapshot", "SnapshotGroup", "SnapshotModule", "snapshot"),
        "training.trajectory": ("LoggedStep", "Trajectory"),
        "render.html": ("write_html",),
        "render.plots": ("write_plots",),
    },
    "lorakit.merging": {
        "_merge": ("merge",),
        "_report": ("MergeReport", "MergedModule"),
        "_retention": ("ScoreDifference", "TaskRetention"),
    },
    "lorakit.naming": {
        "patterns": (
            "alpha_of",
            "compact_pattern",
            "lookup",
            "targeted_modules",
            "targeted_parameters",
            "unmatched_keys",
        ),
        "roles": ("ROLES", "Role", "layer_of", "layer_prefix", "role_of"),
        "targets": ("default_targets",),
    },
    "lorakit.serving": {
        "_check": ("ServedModule", "ServerCheck", "check", "check_all"),
        "_formats": ("FormatModule", "FormatReport"),
        "_gguf": ("GGUFReport", "write_gguf"),
        "_image_models": ("write_diffusers", "write_kohya"),
        "_mlx": ("write_mlx",),
        "_profiles": ("PROFILES", "ServerProfile", "vllm_max_lora_rank"),
    },
    "lorakit.spectral": {
        "lowrank": ("SVD", "LowRank"),
        "metrics": (
            "ScalingLaw",
            "adapter_parameters",
            "capacity_utilization",
            "dominance",
            "effective_rank",
            "energy_curve",
            "energy_rank",
            "fit_scaling_law",
            "forward_multiply_adds",
            "full_parameters",
            "imbalance_ratio",
            "knee",
            "loss_gap_bound",
            "parameter_ratio",
            "pearson",
            "spectral_entropy",
            "spectral_truncation_error",
            "stable_rank",
            "truncation_error",
            "utilization",
        ),
        "threshold": ("hard_threshold_coefficient", "hard_threshold_rank"),
        "subspace": (
            "gradient_overlap",
            "leading_similarity",
            "principal_angles",
            "principal_cosines",
            "random_subspace_overlap",
            "random_update_cosine",
            "residual_ratio",
            "subspace_overlap",
            "topk_overlap",
            "update_cosine",
        ),
    },
    "lorakit.statistics": {
        "_corpus": ("CorpusInterval", "jackknife_interval"),
        "_interval": ("Interval",),
        "_multiple": (
            "CandidateVerdicts",
            "FixedSequence",
            "TaskVerdicts",
            "combine_tasks",
            "compare_candidates",
            "fixed_sequence",
            "holm",
        ),
        "_paired": ("PairedInterval", "paired_interval"),
        "_seeds": ("SeedsInterval", "seeds_interval"),
        "_verdict": ("Verdict", "control_p_value", "documents_needed", "verdict"),
    },
    "lorakit.surgery": {
        "_policies": (
            "POLICIES",
            "AbsSelect",
            "DoubleSmooth",
            "GradDirection",
            "Policy",
            "RandomIndex",
            "RobustZ",
            "SmoothAbs",
            "ZScore",
        ),
        "_edit": ("SurgeryReport",),
        "_report": ("EditedRow", "SensitivityReport", "SensitivityRow"),
        "_refine": ("refine",),
        "_refine_report": ("RefineCandidate", "RefineReport"),
        "_restore_report": ("FrontierPoint", "RestoreControl", "RestoreEdit", "RestoreReport", "RestoredRow"),
        "_reweight": ("reweight",),
        "_select": ("select_modules",),
        "_sensitivity": ("sensitivity",),
        "_study": ("study",),
        "_study_report": ("StudiedEdit", "StudyReport"),
    },
}


def exports(package: str) -> dict[str, str]:
    """The public names of `package`, each with the module that defines it (or that it is)."""
    found: dict[str, str] = {}
    for file, names in _FILES[package].items():
        found |= dict.fromkeys(names or (file,), f"{package}.{file}")
    return found


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for the package's `__init__`.

    Example:
        >>> __getattr__, __dir__, __all__ = attach("lorakit.spectral")
        >>> __getattr__("effective_rank").__name__
        'effective_rank'
    """
    owners = exports(package)

    def get(name: str) -> Any:
        if name not in owners:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(owners[name])
        if owners[name] == f"{package}.{name}":
            return module
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted(set(vars(sys.modules[package])) | set(owners))

    return get, listed, sorted(owners)
