"""What an audit reports: rows, summaries and findings, frozen, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lorakit._report import Report
from lorakit.adapters.adapter import Kind
from lorakit.errors import Finding
from lorakit.lens._rows import mean
from lorakit.lens.static.suggestions import RankSuggestion, covering
from lorakit.naming.roles import Role, group_of


@dataclass(frozen=True)
class AuditedModule:
    """One module's ΔW, scaling included. Where it is not finite the numbers are None, the singular values empty.

    `low_rank_part_only`: the module has a DoRA magnitude or a SpecLoRA mask, so this is not its whole update; `beside`
    has statistics of that: of d (not d − 1) under "d", of the magnitudes under "magnitude".
    """

    module_name: str
    role: Role | None
    layer: int | None
    kind: Kind
    d_out: int
    d_in: int
    rank: int
    scaling: float
    parameters: int
    dtype: str
    low_rank_part_only: bool
    beside: dict[str, dict[str, float]]
    singular_values: tuple[float, ...] = ()
    frobenius_norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    capacity_utilization: float | None = None
    utilization: float | None = None
    energy_rank: dict[str, int] | None = None  # by threshold
    knee: int | None = None

    @property
    def group(self) -> str:
        return group_of(self.module_name)

    @property
    def bytes_per_entry(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the singular values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "singular_values"}


@dataclass(frozen=True)
class GroupSummary:
    """Modules of one role, or of one layer, or all: means over those that are finite; None where there are none.

    `energy_share` is the group's part of Σ ‖ΔW‖_F². `energy_rank_median` and `energy_rank_p90`, by threshold, are the
    smallest k that cover half, and nine tenths, of the modules.
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


@dataclass(frozen=True)
class AuditReport(Report):
    """What `lorakit.lens.audit` found; `energy` is the share that suggested ranks keep."""

    path: str
    peft_type: str
    base_model: str | None
    energy: float
    modules: tuple[AuditedModule, ...]
    total: GroupSummary
    roles: tuple[GroupSummary, ...]
    layers: tuple[GroupSummary, ...]
    parameters_beside: int
    suggestions: tuple[RankSuggestion, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as JSON has them: no NaN, no infinity."""
        summary = {
            "path": self.path,
            "peft_type": self.peft_type,
            "base_model": self.base_model,
            "energy": self.energy,
            "parameters_beside": self.parameters_beside,
            **{key: value for key, value in asdict(self.total).items() if key not in ("name", "energy_share")},
            "roles": [asdict(group) for group in self.roles],
            "layers": [asdict(group) for group in self.layers],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
        }
        return {
            "modules": [module.to_dict() for module in self.modules],
            "summary": summary,
            "findings": [asdict(finding) for finding in self.findings],
        }


def summarize(name: str, modules: Sequence[AuditedModule], everything: Sequence[AuditedModule]) -> GroupSummary:
    """The summary of some modules, out of all."""
    layers = [module.layer for module in modules if module.layer is not None]
    ranks = [module.rank for module in modules]
    finite = [module for module in modules if module.energy_rank is not None]
    norm, all_norm = total_norm(finite), total_norm(everything)
    ks = (
        {q: [m.energy_rank[q] for m in finite if m.energy_rank] for q in (finite[0].energy_rank or {})}
        if finite
        else {}
    )
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
    )


def total_norm(modules: Iterable[AuditedModule]) -> float:
    """√Σ ‖ΔW‖_F²."""
    return math.hypot(*(module.frobenius_norm or 0.0 for module in modules))
