"""How the effective rank of adapters grows with their rank.

Reference: LoRA-Lens, section 2.1: r̂ = a · r^β, the mean effective rank over modules against the rank in training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import number
from lorakit._report import Report, ordered
from lorakit.errors import Finding
from lorakit.lens._rows import grouped
from lorakit.lens._sources import Source, about_bases, about_low_rank_part, of_adapter, open_all
from lorakit.lens.diagnostics._next_steps import on_disk
from lorakit.lens.static.spectra import AuditedModule, measure
from lorakit.spectral import ScalingLaw, fit_scaling_law

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LawPoint:
    """The modules of one rank: their mean effective rank, and its standard deviation and standard error over modules.

    `std` has n − 1 in the denominator. Both are None for a single module.
    """

    rank: int
    modules: int
    effective_rank: float
    std: float | None
    stderr: float | None


@dataclass(frozen=True)
class LawFit:
    """The law of one role, or of all modules: least squares of the logarithms through the `points`, equally weighted.

    `beta_stderr` is β's standard error from the scatter of the points about the line; None for two points. If there is
    no law, `law` is None and `reason` says why.
    """

    name: str
    law: ScalingLaw | None
    beta_stderr: float | None
    points: tuple[LawPoint, ...]
    reason: str | None = None

    def __str__(self) -> str:
        if self.law is None:
            return f"no fit: {self.reason}"
        beta = f"{self.law.beta:.3f}" + ("" if self.beta_stderr is None else f" ± {self.beta_stderr:.3f}")
        return f"a = {number(self.law.a)}, β = {beta}, R² = {self.law.r_squared:.4f}"


@dataclass(frozen=True, repr=False)
class ScalingLawReport(Report):
    """The result of `lorakit.lens.scaling_law` for the adapters at `paths`."""

    paths: tuple[str, ...]
    total: LawFit
    roles: tuple[LawFit, ...]
    findings: tuple[Finding, ...]

    @property
    def headline(self) -> str:
        return f"effective rank = a · r^β over {len(self.paths)} adapters: {self.total}"

    @property
    def details(self) -> tuple[str, ...]:
        return tuple(f"{fit.name}: {fit}" for fit in self.roles)

    @property
    def next_steps(self) -> tuple[str, ...]:
        if not all(map(on_disk, self.paths)):
            return ()
        return (f"lorakit.lens.conditions({list(self.paths)!r})",)

    def to_dict(self) -> dict[str, Any]:
        """`total`, `roles`, `paths` and `findings` as plain data for JSON, without NaN and infinity."""
        return {
            "total": asdict(self.total),
            "roles": [asdict(fit) for fit in self.roles],
            "paths": list(self.paths),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row a fit: all modules, then each role."""
        return [
            {
                "name": fit.name,
                "a": None if fit.law is None else fit.law.a,
                "beta": None if fit.law is None else fit.law.beta,
                "beta_stderr": fit.beta_stderr,
                "r_squared": None if fit.law is None else fit.law.r_squared,
                "ranks": len(fit.points),
                "reason": fit.reason,
            }
            for fit in (self.total, *self.roles)
        ]

    def plot(self) -> Figure:
        """Mean effective rank against rank, both logarithmic: points with standard errors over modules, and fits."""
        figure = new_figure(8, 5)
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for i, fit in enumerate(self.roles):
            _draw(axes, fit, f"C{i}")
        _draw(axes, self.total, "k", "s", 1.5)
        ranks = sorted({point.rank for point in self.total.points})
        title = f"Effective rank against rank, {len(self.paths)} adapters"
        axes.set(xlabel="rank r", ylabel="mean effective rank r̂", title=title)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        if ranks:
            values = [point.effective_rank for fit in (*self.roles, self.total) for point in fit.points]
            axes.plot(ranks, ranks, ":", lw=1, color="0.6", label="r̂ = r")
            axes.set_ylim(2 ** math.floor(math.log2(min(values))), 2 ** (math.floor(math.log2(max(values))) + 1))
            axes.legend(fontsize=8)
        return figure


def _draw(axes: Any, fit: LawFit, colour: str, marker: str = "o", width: float = 0.8) -> None:
    if not fit.points:
        return
    x = [point.rank for point in fit.points]
    y = [point.effective_rank for point in fit.points]
    label = escape_mathtext(fit.name)
    if fit.law is not None:
        label += f": {number(fit.law.a)} · r^{fit.law.beta:.3f}, R² = {fit.law.r_squared:.4f}"
        ends = [min(x), max(x)]
        axes.plot(ends, [fit.law(rank) for rank in ends], color=colour, lw=width)
    errors = [point.stderr or 0.0 for point in fit.points]
    axes.errorbar(x, y, yerr=errors, fmt=marker, ms=4, capsize=2, color=colour, label=label)


def scaling_law(adapters: Source | Sequence[Source]) -> ScalingLawReport:
    """Fit r̂ = a · r^β to adapters of one task and model that were trained at different ranks.

    As in the paper, the fit is to the mean effective rank at each rank, over all modules and for each role. A module
    counts at its own rank, so an adapter with a `rank_pattern` has modules at several ranks, and can be fitted alone.
    If the modules differ between ranks, the fit mixes the effects of ranks and modules, which a finding says. Another
    finding says if the base models differ. Updates that are zero or not finite are left out, with a finding. For DoRA
    and SPECLORA the low-rank part is measured.

    Args:
        adapters: directories, files, Hub ids, PeftModels or open adapters. For several adapters in one model:
            ``[lorakit.adapters.open_adapter(model, adapter_name=name) for name in names]``.
    Raises: AdapterFileError, UnsupportedModelError for an adapter that cannot be read; ValueError for no adapters.

    Example:
        >>> import torch
        >>> from lorakit import lens
        >>> from peft import LoraConfig, get_peft_model
        >>> _ = torch.manual_seed(0)
        >>> models = []
        >>> for r in (2, 4, 8):
        ...     config = LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)
        ...     models.append(get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config))
        >>> report = lens.scaling_law(models)
        >>> [point.rank for point in report.total.points], report.total.law.beta < 1
        ([2, 4, 8], True)
    """
    views = open_all(adapters)
    findings = list(about_bases(views))
    rows: list[AuditedModule] = []
    for view in tqdm(views, desc="scaling law", delay=1.0, unit="adapter", leave=False, disable=None):
        found = list(view.findings)
        measured = measure(view, {}, found, description="adapter")
        rows += [row for row in measured if row.effective_rank]
        zero = sum(row.effective_rank == 0 for row in measured)
        if zero:
            message = f"{zero} updates are zero and are left out of the fits."
            found.append(Finding("warning", "left_out", None, message))
        findings += of_adapter(view, [*found, *about_low_rank_part(view)])
    groups, _ = grouped(rows)
    return ScalingLawReport(
        paths=tuple(view.path for view in views),
        total=_fit("all", rows, findings),
        roles=tuple(_fit(name, group, findings) for name, group in groups.items()),
        findings=ordered(findings),
    )


def _fit(name: str, rows: Sequence[AuditedModule], findings: list[Finding]) -> LawFit:
    by_rank: dict[int, list[AuditedModule]] = {}
    for row in rows:
        by_rank.setdefault(row.rank, []).append(row)
    points = tuple(_point(rank, by_rank[rank]) for rank in sorted(by_rank))
    if len(points) < 2:
        reason = (
            f"all modules have rank {points[0].rank}, and a law needs two ranks or more"
            if points
            else "no module has a finite, non-zero update"
        )
        findings.append(Finding("info", "no_fit", None, f"{name}: there is no fit: {reason}."))
        return LawFit(name, None, None, points, reason)
    if len({frozenset(row.module_name for row in group) for group in by_rank.values()}) > 1:
        message = f"{name}: the modules differ between ranks, so the fit mixes the effects of ranks and modules."
        findings.append(Finding("warning", "mixed_modules", None, message))
    if len(points) == 2:
        message = f"{name}: two ranks determine the law, so R² = 1 says nothing."
        findings.append(Finding("info", "two_points", None, message))
    law = fit_scaling_law([point.rank for point in points], [point.effective_rank for point in points])
    return LawFit(name, law, _beta_stderr(law, points), points)


def _point(rank: int, rows: Sequence[AuditedModule]) -> LawPoint:
    values = [row.effective_rank or 0.0 for row in rows]
    std = statistics.stdev(values) if len(values) > 1 else None
    return LawPoint(
        rank, len(rows), statistics.fmean(values), std, None if std is None else std / math.sqrt(len(values))
    )


def _beta_stderr(law: ScalingLaw, points: Sequence[LawPoint]) -> float | None:
    """√(Σ residual² / (n − 2) / Σ (x − x̄)²), over the logarithms."""
    if len(points) < 3:
        return None
    x = [math.log(point.rank) for point in points]
    residual = sum(math.log(point.effective_rank / law(point.rank)) ** 2 for point in points)
    spread = sum((value - statistics.fmean(x)) ** 2 for value in x)
    return math.sqrt(residual / (len(points) - 2) / spread)
