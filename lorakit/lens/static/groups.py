"""Summaries of audited modules by role, by layer and over all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorakit.lens._rows import mean
from lorakit.lens.static.spectra import AuditedModule
from lorakit.lens.static.suggestions import covering

_METRICS = ("stable_rank", "effective_rank", "capacity_utilization", "utilization", "top1_share")


@dataclass(frozen=True)
class GroupSummary:
    """Modules of one role, of one layer, or all: means over the finite ones; None if there are none.

    `medians` and `weighted_means` (weighted by parameters) are of stable and effective rank, capacity utilization,
    utilization and top-1 share; None if there are none. `top_share`: the share of the group's Σ ‖ΔW‖_F² that its
    largest module has. `concentration`: the sum of the squared shares (Herfindahl), 1 / n for n modules of one norm.
    `relative_norm`: √(Σ ‖ΔW‖_F² / Σ ‖W‖_F²) over the modules whose base weight was given.
    `energy_share`: the group's share of Σ ‖ΔW‖_F². `energy_rank_median` and `energy_rank_p90`: for each share of
    ‖ΔW‖_F² (the key), the rank that keeps it in half, and in nine tenths, of the modules.
    """

    name: str
    modules: int
    layers: tuple[int, int] | None
    ranks: tuple[int, int] | None
    parameters: int
    frobenius_norm: float | None
    energy_share: float | None
    spectral_norm_mean: float | None
    stable_rank_mean: float | None
    effective_rank_mean: float | None
    capacity_utilization_mean: float | None
    utilization_mean: float | None
    energy_rank_median: dict[str, int] | None
    energy_rank_p90: dict[str, int] | None
    medians: dict[str, float] | None = None
    weighted_means: dict[str, float] | None = None
    top_share: float | None = None
    concentration: float | None = None
    relative_norm: float | None = None


def summarize(name: str, modules: Sequence[AuditedModule], all_norm: float) -> GroupSummary:
    """The summary of `modules`, a part of those whose `total_norm` is `all_norm`."""
    layers = [module.layer for module in modules if module.layer is not None]
    ranks = [module.rank for module in modules]
    finite = [module for module in modules if module.energy_rank is not None]
    norm = total_norm(finite)
    thresholds = (finite[0].energy_rank or {}) if finite else {}
    ks = {q: [m.energy_rank[q] for m in finite if m.energy_rank] for q in thresholds}
    metrics = {metric: [float(getattr(module, metric) or 0.0) for module in finite] for metric in _METRICS}
    weights = [float(module.parameters) for module in finite]
    shares = [((module.frobenius_norm or 0.0) / norm) ** 2 for module in finite] if norm else []
    return GroupSummary(
        name=name,
        modules=len(modules),
        layers=(min(layers), max(layers)) if layers else None,
        ranks=(min(ranks), max(ranks)) if ranks else None,
        parameters=sum(module.parameters for module in modules),
        frobenius_norm=norm if finite else None,
        energy_share=((norm / all_norm) ** 2 if all_norm else 0.0) if finite else None,
        spectral_norm_mean=mean(module.spectral_norm for module in finite),
        stable_rank_mean=mean(module.stable_rank for module in finite),
        effective_rank_mean=mean(module.effective_rank for module in finite),
        capacity_utilization_mean=mean(module.capacity_utilization for module in finite),
        utilization_mean=mean(module.utilization for module in finite),
        energy_rank_median={q: covering(values, 0.5) for q, values in ks.items()} if finite else None,
        energy_rank_p90={q: covering(values, 0.9) for q, values in ks.items()} if finite else None,
        medians={metric: statistics.median(values) for metric, values in metrics.items()} if finite else None,
        weighted_means={metric: statistics.fmean(values, weights) for metric, values in metrics.items()}
        if finite
        else None,
        top_share=max(shares, default=None),
        concentration=math.fsum(share**2 for share in shares) if shares else None,
        relative_norm=_relative_norm(finite),
    )


def _relative_norm(modules: Sequence[AuditedModule]) -> float | None:
    known = [module for module in modules if module.base_norm]
    return total_norm(known) / math.hypot(*(module.base_norm or 0.0 for module in known)) if known else None


def total_norm(modules: Iterable[AuditedModule]) -> float:
    """√Σ ‖ΔW‖_F²."""
    return math.hypot(*(module.frobenius_norm or 0.0 for module in modules))
