"""How much of each update its leading components hold, and what is lost by keeping no more.

References: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026: the energy curve
C(k) = Σ_{i≤k} σ² / Σ σ²; Eckart & Young 1936: the errors of the best approximation of rank k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report, ordered
from lorakit.adapters import open_adapter
from lorakit.errors import Finding
from lorakit.lens._rows import grouped
from lorakit.lens._sources import Source, about_low_rank_part
from lorakit.lens.static.spectra import AuditedModule, measure
from lorakit.naming.roles import Role
from lorakit.spectral import energy_curve, spectral_truncation_error, truncation_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (0.9, 0.95, 0.99)
_BAND = (0.1, 0.9)  # quantiles over modules


@dataclass(frozen=True)
class EnergyCurve:
    """One module's ΔW, scaling included. The tuples are for k = 1, 2, … up to the number of its singular values, which
    is `rank`, or min(d_out, d_in) where that is less.

    `energy`: C(k), 0 throughout for ΔW = 0. `truncation_error`: Σ_{i>k} σ², the squared Frobenius norm of what is left
    out. `spectral_error`: σ_{k+1}, its spectral norm. `energy_rank`: the smallest k that keeps .9, .95 and .99.
    """

    module_name: str
    role: Role | None
    layer: int | None
    rank: int
    low_rank_part_only: bool
    energy: tuple[float, ...]
    truncation_error: tuple[float, ...]
    spectral_error: tuple[float, ...]
    energy_rank: dict[str, int]


@dataclass(frozen=True)
class MeanCurve:
    """The curves of one role, or of all modules, for k = 1, 2, … up to the largest rank; a curve stays 1 past its end.

    `low` and `high`: what a tenth of the modules is below and above (quantiles by linear interpolation). `energy_rank`:
    the smallest k at which the mean reaches .9, .95 and .99; `energy_rank_of_all`: the smallest at which every module
    does. Updates that are zero have no share of anything and are not among the `modules`.
    """

    name: str
    modules: int
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    energy_rank: dict[str, int]
    energy_rank_of_all: dict[str, int]


@dataclass(frozen=True)
class EnergyCurves(Report):
    """What `lorakit.lens.energy_curves` found; `total` is None, and `roles` empty, where every update is zero."""

    path: str
    peft_type: str
    modules: tuple[EnergyCurve, ...]
    total: MeanCurve | None
    roles: tuple[MeanCurve, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as JSON has them: no NaN, no infinity."""
        return super().to_dict()

    def plot(self) -> Figure:
        """The mean curve of each role over k, and of all modules; shaded between the tenth below and that above.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(8, 5)
        axes = figure.subplots()
        for curve in self.roles:
            k = range(1, len(curve.mean) + 1)
            (line,) = axes.plot(k, curve.mean, "o-", ms=3, label=f"{escape_mathtext(curve.name)} ({curve.modules})")
            axes.fill_between(k, curve.low, curve.high, color=line.get_color(), alpha=0.12, linewidth=0)
        if self.total is not None:
            k = range(1, len(self.total.mean) + 1)
            axes.plot(k, self.total.mean, "k--", lw=1.5, label=f"all ({self.total.modules})")
        for threshold in THRESHOLDS:
            axes.axhline(threshold, color="0.85", lw=0.8, zorder=0)
        axes.set(xlabel="components kept k", ylabel="share of ‖ΔW‖_F² kept, C(k)", ylim=(0, 1.02))
        axes.set_title("Energy curves: mean over modules, 10 to 90 % shaded")
        axes.locator_params(axis="x", integer=True)
        if self.total is not None:
            axes.legend(fontsize=8, loc="lower right")
        return figure


def energy_curves(adapter: Source, *, adapter_name: str | None = None) -> EnergyCurves:
    """Energy curves and truncation errors of an adapter: a directory, a file, a Hub id, a PeftModel or an open adapter.

    Of ΔW, scaling included; of DoRA and SPECLORA it is the low-rank part, which the findings say. Modules that are not
    finite are left out, and among the findings as errors; updates of zero are among `modules`, and left out of means.

    Args:
        adapter_name: which adapter of a PeftModel, if not the active one.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read.
    """
    view = open_adapter(adapter, adapter_name=adapter_name)
    findings = list(view.findings)
    rows = measure(view, {str(q): q for q in THRESHOLDS}, findings, description="energy curves")
    rows = tuple(row for row in rows if row.energy_rank is not None)
    findings += about_low_rank_part(view)
    curves = _curves(rows)
    nonzero = [row for row in rows if row.spectral_norm]
    groups, _ = grouped(nonzero)
    return EnergyCurves(
        path=view.path,
        peft_type=view.settings.peft_type,
        modules=tuple(curves[row.module_name] for row in rows),
        total=_mean("all", nonzero, curves) if nonzero else None,
        roles=tuple(_mean(name, group, curves) for name, group in groups.items()),
        findings=ordered(findings),
    )


def _curves(rows: Sequence[AuditedModule]) -> dict[str, EnergyCurve]:
    """By module; computed for all spectra of one length at a time."""
    lengths: dict[int, list[AuditedModule]] = {}
    for row in rows:
        lengths.setdefault(len(row.singular_values), []).append(row)
    found = {}
    for length, group in lengths.items():
        sigma = torch.tensor([row.singular_values for row in group], dtype=torch.float64)
        ranks = range(1, length + 1)
        tails = torch.stack([truncation_error(sigma, k) for k in ranks], -1)
        nexts = torch.stack([spectral_truncation_error(sigma, k) for k in ranks], -1)
        for row, energy, tail, following in zip(
            group, energy_curve(sigma).tolist(), tails.tolist(), nexts.tolist(), strict=True
        ):
            found[row.module_name] = EnergyCurve(
                module_name=row.module_name,
                role=row.role,
                layer=row.layer,
                rank=row.rank,
                low_rank_part_only=row.low_rank_part_only,
                energy=tuple(energy),
                truncation_error=tuple(tail),
                spectral_error=tuple(following),
                energy_rank=row.energy_rank or {},
            )
    return found


def _mean(name: str, rows: Sequence[AuditedModule], curves: dict[str, EnergyCurve]) -> MeanCurve:
    members = [curves[row.module_name] for row in rows]
    length = max(len(curve.energy) for curve in members)
    stacked = torch.tensor(
        [[*curve.energy, *[1.0] * (length - len(curve.energy))] for curve in members], dtype=torch.float64
    )
    low, high = torch.quantile(stacked, torch.tensor(_BAND, dtype=torch.float64), dim=0)
    mean = stacked.mean(0)
    return MeanCurve(
        name=name,
        modules=len(members),
        mean=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        energy_rank={str(q): _reaches(mean, q) for q in THRESHOLDS},
        energy_rank_of_all={str(q): max(curve.energy_rank[str(q)] for curve in members) for q in THRESHOLDS},
    )


def _reaches(mean: Tensor, threshold: float) -> int:
    """The first k at which the mean curve is there, rounding aside."""
    slack = len(mean) * torch.finfo(mean.dtype).eps
    return int((mean < threshold * (1 - slack)).sum()) + 1
