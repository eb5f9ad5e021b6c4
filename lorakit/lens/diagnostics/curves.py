"""How much of each update its leading components hold, and how much is lost by keeping only those.

References: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026: the energy curve
C(k) = Σ_{i≤k} σ² / Σ σ²; Eckart & Young 1936: the errors of the best approximation of rank k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import reduce
from torch import Tensor

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import number
from lorakit._report import Report, ordered
from lorakit.adapters import open_adapter
from lorakit.errors import Finding
from lorakit.lens._curvature import Curvature, CurvatureSource, about_partial_updates, read_curvature
from lorakit.lens._rows import grouped
from lorakit.lens._sources import Source, about_low_rank_part
from lorakit.lens.diagnostics._next_steps import beside, on_disk, short_name
from lorakit.lens.static.spectra import AuditedModule, measure
from lorakit.naming.roles import Role
from lorakit.spectral import energy_curve, loss_gap_bound, spectral_truncation_error, truncation_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (0.9, 0.95, 0.99)
_BAND = (0.1, 0.9)  # quantiles over modules


@dataclass(frozen=True)
class EnergyCurve:
    """One module's ΔW, scaling included. The tuples are for k = 1, 2, … up to min(rank, d_out, d_in).

    `energy`: C(k), the fraction of ‖ΔW‖_F² in the k leading components; all 0 if ΔW = 0. `truncation_error`:
    Σ_{i>k} σ², the squared Frobenius norm of the rest. `spectral_error`: σ_{k+1}, the spectral norm of the rest.
    `energy_rank`: the smallest k with C(k) of at least .9, .95 and .99. `loss_gap_upper` and `loss_gap_lower`:
    (L/2) Σ_{i>k} σ² and (μ/2) Σ_{i>k} σ², where the module's L and μ were given: how much the loss may rise if this
    update alone is cut to rank k, local estimates; None for updates of which only the low-rank part is known.
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
    loss_gap_upper: tuple[float, ...] | None = None
    loss_gap_lower: tuple[float, ...] | None = None


@dataclass(frozen=True)
class MeanCurve:
    """The curves of one role, or of all modules, for k = 1, 2, … up to the largest rank. Shorter curves end with ones.

    `low` and `high` are the 10th and 90th percentile over modules (linear interpolation). `energy_rank` is the smallest
    k at which the mean reaches .9, .95 and .99, and `energy_rank_of_all` the smallest at which every module does.
    Updates of zero are not among the `modules`.
    """

    name: str
    modules: int
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    energy_rank: dict[str, int]
    energy_rank_of_all: dict[str, int]


@dataclass(frozen=True, repr=False)
class EnergyCurves(Report):
    """The result of `lorakit.lens.energy_curves`. If every update is zero, `total` is None and `roles` is empty."""

    path: str
    peft_type: str
    modules: tuple[EnergyCurve, ...]
    total: MeanCurve | None
    roles: tuple[MeanCurve, ...]
    findings: tuple[Finding, ...]
    curvature: tuple[Curvature, ...] = ()

    @property
    def headline(self) -> str:
        if self.total is None:
            return f"{self.path}: every update is zero"
        ranks = ", ".join(f"{k} ({float(q):.0%})" for q, k in self.total.energy_rank.items())
        return f"{self.path}: mean energy of {self.total.modules} updates reached at rank {ranks}"

    @property
    def details(self) -> tuple[str, ...]:
        lines = [] if self.total is None else [f"every module keeps 90% at rank {self.total.energy_rank_of_all['0.9']}"]
        lines += [f"{curve.name} ({curve.modules}): 90% at rank {curve.energy_rank['0.9']}" for curve in self.roles]
        lines += [
            f"{where} cut to 90%: at most {number(upper)} more loss, a local estimate"
            for where, upper in self._loss_gaps.items()
        ]
        return (*lines, *(finding.message for finding in self.findings if finding.severity == "error"))

    @property
    def _loss_gaps(self) -> dict[str, float]:
        """The bounds from above where 90 % of the energy is kept, by what is cut."""
        gaps = {
            row.module_name: row.loss_gap_upper[max(0, row.energy_rank["0.9"] - 1)]
            for row in self.modules
            if row.loss_gap_upper is not None
        }
        if all(one.of is not None for one in self.curvature):
            return gaps
        return {"all modules together": sum(gaps.values())} if len(gaps) == len(self.modules) else {}

    @property
    def next_steps(self) -> tuple[str, ...]:
        path = on_disk(self.path)
        needed = max((curve.energy_rank["0.9"] for curve in self.modules), default=0)
        if path is None or self.has_errors or self.total is None:
            return ()
        if needed == max(curve.rank for curve in self.modules):
            return (f"lorakit audit {path} --suggest-ranks",)
        return (f"lorakit compress {path} {beside(self.path, '-energy-90')} --energy 0.9",)

    def rows(self) -> list[dict[str, Any]]:
        """One row a module."""
        return [
            {
                "module_name": row.module_name,
                "role": row.role,
                "layer": row.layer,
                "rank": row.rank,
                **{f"energy_rank_{q}": k for q, k in row.energy_rank.items()},
                "energy": list(row.energy),
                "loss_gap_upper": None if row.loss_gap_upper is None else list(row.loss_gap_upper),
            }
            for row in self.modules
        ]

    def plot(self) -> Figure:
        """The mean curve of each role and of all modules. The grey band is the 10th to 90th percentile of all."""
        figure = new_figure(8, 5)
        axes = figure.subplots()
        for threshold in THRESHOLDS:
            axes.axhline(threshold, color="0.85", lw=0.8, zorder=0)
        for curve in self.roles:
            axes.plot(_ranks(curve), curve.mean, "o-", ms=3, label=escape_mathtext(curve.name))
        if self.total is not None:
            k = _ranks(self.total)
            axes.plot(k, self.total.mean, "k--", lw=1.5, label="all")
            axes.fill_between(k, self.total.low, self.total.high, color="0.9", linewidth=0, label="10–90 % of modules")
            axes.legend(fontsize=8, loc="lower right")
        axes.set(xlabel="components kept k", ylabel="fraction of ‖ΔW‖_F² kept, C(k)", ylim=(0, 1.02))
        axes.set_title(escape_mathtext(f"Energy curves of {short_name(self.path)}: means over modules"))
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        return figure


def _ranks(curve: MeanCurve) -> range:
    return range(1, len(curve.mean) + 1)


def energy_curves(
    adapter: Source, *, curvature: CurvatureSource | None = None, adapter_name: str | None = None
) -> EnergyCurves:
    """Energy curves and truncation errors of an adapter.

    They are of ΔW, scaling included; for DoRA and SPECLORA of the low-rank part, which a finding says. Modules that are
    not finite are left out, each with a finding of severity error. Updates of zero are in `modules`, but in no mean.

    Args:
        adapter: a directory, a file, a Hub id, a PeftModel or an open adapter.
        curvature: also bound what each rank may cost in loss: a `lorakit.lens.Curvature` of all weights, or one of
            each of some modules, which `lorakit.experiments.pilot.hessian_spectrum(module=…)` measures.
        adapter_name: which adapter of a PeftModel, if not the active one.
    Raises: AdapterFileError, UnsupportedModelError for an adapter that cannot be read; ValueError and TypeError for a
        `curvature` of modules that the adapter lacks, or of another type.

    Example:
        >>> import torch
        >>> from lorakit import lens
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> report = lens.energy_curves(model)
        >>> len(report.modules[0].energy), round(report.modules[0].energy[-1], 6)
        (2, 1.0)
    """
    view = open_adapter(adapter, adapter_name=adapter_name)
    findings = list(view.findings)
    rows = measure(view, {str(q): q for q in THRESHOLDS}, findings, description="energy curves")
    bounds = read_curvature(curvature, [row.module_name for row in rows])
    rows = tuple(row for row in rows if row.energy_rank is not None)
    findings += [*about_low_rank_part(view), *about_partial_updates(bounds, rows)]
    curves = _curves(rows, bounds)
    nonzero = [row for row in rows if row.spectral_norm]
    groups, _ = grouped(nonzero)
    return EnergyCurves(
        path=view.path,
        peft_type=view.settings.peft_type,
        modules=tuple(curves[row.module_name] for row in rows),
        total=_mean("all", nonzero, curves) if nonzero else None,
        roles=tuple(_mean(name, group, curves) for name, group in groups.items()),
        findings=ordered(findings),
        curvature=bounds,
    )


def _curves(rows: Sequence[AuditedModule], curvature: Sequence[Curvature]) -> dict[str, EnergyCurve]:
    """Curves by module, computed for all spectra of one length at once."""
    lengths: dict[int, list[AuditedModule]] = {}
    for row in rows:
        lengths.setdefault(len(row.singular_values), []).append(row)
    found = {}
    for length, group in lengths.items():
        sigma = torch.tensor([row.singular_values for row in group], dtype=torch.float64)
        ranks = range(1, length + 1)
        tails = torch.stack([truncation_error(sigma, k) for k in ranks], -1)
        nexts = torch.stack([spectral_truncation_error(sigma, k) for k in ranks], -1)
        gaps = torch.stack([loss_gap_bound(sigma, k, 1.0) for k in ranks], -1)  # at L = 1
        for row, energy, tail, following, gap in zip(
            group, energy_curve(sigma).tolist(), tails.tolist(), nexts.tolist(), gaps.tolist(), strict=True
        ):
            whole = () if row.low_rank_part_only else curvature
            bound = next((one for one in whole if one.of in (None, row.module_name)), None)
            mu = None if bound is None else bound.strong_convexity
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
                loss_gap_upper=None if bound is None else tuple(bound.smoothness * value for value in gap),
                loss_gap_lower=None if mu is None else tuple(mu * value for value in gap),
            )
    return found


def _mean(name: str, rows: Sequence[AuditedModule], curves: dict[str, EnergyCurve]) -> MeanCurve:
    members = [curves[row.module_name] for row in rows]
    length = max(len(curve.energy) for curve in members)
    stacked = torch.tensor(
        [[*curve.energy, *[1.0] * (length - len(curve.energy))] for curve in members], dtype=torch.float64
    )
    low, high = torch.quantile(stacked, torch.tensor(_BAND, dtype=torch.float64), dim=0)
    mean = reduce(stacked, "module k -> k", "mean")
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
    """The smallest k at which the mean curve reaches the threshold, up to rounding."""
    slack = len(mean) * torch.finfo(mean.dtype).eps
    return int((mean < threshold * (1 - slack)).sum()) + 1
