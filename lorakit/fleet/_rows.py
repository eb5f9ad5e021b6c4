"""One row for each adapter of a fleet: what an audit says of it, small enough to keep a million of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.adapters import Adapter, AdapterModule
from lorakit.errors import Finding
from lorakit.lens import AuditReport
from lorakit.serving import ServerCheck

WASTE_ENERGY = 0.99
# What adapters of one family are compared by.
METRICS = ("frobenius_norm", "stable_rank", "effective_rank", "utilization", "concentration", "waste_share")


@dataclass(frozen=True)
class FleetFinding:
    """All findings of one code about an adapter: how many there are, and the message of the first."""

    severity: Literal["error", "warning", "info"]
    code: str
    count: int
    message: str


@dataclass(frozen=True)
class FleetAdapter:
    """One adapter. If it could not be read, `error_type` and `error` say why, and what was not measured is None.

    `sha256`: of the config and the weights, each with its length. `size_bytes`: of both files. `module_set`: a digest
    of the modules' names, shapes and ranks. `waste_bytes`: what a cut of each module to the rank that keeps 99 % of
    ‖ΔW‖_F² would save, and `waste_share` its share of the factors' bytes. `frobenius_norm`: √Σ ‖ΔW‖_F²; stable rank,
    effective rank and utilization are means over modules; `concentration`: the sum of the squared shares of Σ ‖ΔW‖_F².
    `low_rank_part_only`: the adapter has tensors beside the low-rank updates, such as DoRA's magnitudes.
    `percentiles`: the place among the adapters of its family, 0 to 100, by metric; `unusual`: the metrics in which
    the adapter is an outlier there. `duplicate_of`: the path of the adapter that stands for its group of duplicates.
    """

    path: str
    sha256: str | None = None
    size_bytes: int | None = None
    error_type: str | None = None
    error: str | None = None
    peft_type: str | None = None
    base_model: str | None = None
    modules: int | None = None
    module_set: str | None = None
    ranks: tuple[int, int] | None = None
    parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    waste_bytes: int | None = None
    waste_share: float | None = None
    frobenius_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    utilization: float | None = None
    concentration: float | None = None
    low_rank_part_only: bool = False
    findings: tuple[FleetFinding, ...] = ()
    served_wrong: tuple[str, ...] = ()
    refused_by: tuple[str, ...] = ()
    family: str | None = None
    percentiles: dict[str, float] = field(default_factory=dict)
    unusual: tuple[str, ...] = ()
    duplicate_of: str | None = None

    @property
    def broken(self) -> bool:
        """Whether the adapter could not be read."""
        return self.error_type is not None

    @property
    def has_errors(self) -> bool:
        """Whether the adapter could not be read, or has a finding of severity error."""
        return self.broken or any(finding.severity == "error" for finding in self.findings)


def broken(path: str, error: BaseException) -> FleetAdapter:
    """The row of an adapter that could not be read."""
    return FleetAdapter(path=path, error_type=type(error).__name__, error=str(error) or type(error).__name__)


def measured(view: Adapter, report: AuditReport, checks: Iterable[ServerCheck]) -> dict[str, Any]:
    """What the row of an adapter holds besides its path and files, as fields of FleetAdapter.

    `report` is an audit by expert.
    """
    kept: dict[str, int] = {}  # the experts of one stack are cut to one rank
    for row in report.modules:
        name = row.stack or row.module_name
        rank = row.rank if row.energy_rank is None else row.energy_rank[str(WASTE_ENERGY)]
        kept[name] = max(1, rank, kept.get(name, 0))
    stored = {module.name: _stored_bytes(module) for module in view.modules}
    waste = sum(
        stored[module.name] * (module.rank - min(kept[module.name], module.rank)) // module.rank
        for module in view.modules
    )
    factors = sum(stored.values())
    total = report.total
    verdicts = [(check.server, check.verdict) for check in checks]
    return {
        "peft_type": report.peft_type,
        "base_model": report.base_model,
        "modules": total.modules,
        "module_set": _module_set(view),
        "ranks": total.ranks,
        "parameters": total.parameters,
        "dtypes": tuple(sorted({row.dtype for row in report.modules})),
        "waste_bytes": waste,
        "waste_share": waste / factors if factors else 0.0,
        "frobenius_norm": total.frobenius_norm,
        "stable_rank": total.stable_rank_mean,
        "effective_rank": total.effective_rank_mean,
        "utilization": total.utilization_mean,
        "concentration": total.concentration,
        "low_rank_part_only": bool(view.extras) or any(module.extras for module in view.modules),
        "findings": counted_findings(report.findings),
        "served_wrong": tuple(server for server, verdict in verdicts if verdict == "wrong"),
        "refused_by": tuple(server for server, verdict in verdicts if verdict == "refused"),
    }


def counted_findings(findings: Iterable[Finding]) -> tuple[FleetFinding, ...]:
    """Findings with the same severity and code as one, in order of first appearance."""
    findings = list(findings)
    counts = Counter((finding.severity, finding.code) for finding in findings)
    first = {(finding.severity, finding.code): finding.message for finding in reversed(findings)}
    return tuple(FleetFinding(*kind, count, first[kind]) for kind, count in counts.items())


def _stored_bytes(module: AdapterModule) -> int:
    infos = [info for info in (module.A, module.B, module.E) if info is not None]
    return sum(info.numel * (0 if info.dtype is None else info.dtype.itemsize) for info in infos)


def _module_set(view: Adapter) -> str:
    text = "\n".join(f"{m.name} {m.kind} {m.d_out} {m.d_in} {m.rank} {m.experts}" for m in view.modules)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
