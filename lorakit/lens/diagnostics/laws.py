"""How the effective rank of adapters grows with the rank they are given.

Reference: LoRA-Lens, section 2.1: r̂ = a · r^β, the mean effective rank over modules against the rank trained at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report, ordered
from lorakit.errors import Finding
from lorakit.lens._rows import grouped
from lorakit.lens._sources import Source, about_bases, about_low_rank_part, of_adapter, open_all
from lorakit.lens.static.spectra import AuditedModule, measure
from lorakit.spectral import ScalingLaw, fit_scaling_law

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LawPoint:
    """The modules of one rank: their mean effective rank, its standard deviation over modules (n − 1 below) and
    standard error, both None for a single module."""

    rank: int
    modules: int
    effective_rank: float
    std: float | None
    stderr: float | None


@dataclass(frozen=True)
class LawFit:
    """The law of one role, or of all modules, least squares of the logarithms through the `points`, each counting once.

    `beta_stderr` is β's standard error by the points' scatter about the line, None for two points, which no line
    misses. `law` is None where there is none, and `reason` says why.
    """

    name: str
    law: ScalingLaw | None
    beta_stderr: float | None
    points: tuple[LawPoint, ...]
    reason: str | None = None


@dataclass(frozen=True)
class ScalingLawReport(Report):
    """What `lorakit.lens.scaling_law` found, over the adapters at `paths`."""

    paths: tuple[str, ...]
    total: LawFit
    roles: tuple[LawFit, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`total`, `roles`, `paths` and `findings` as JSON has them: no NaN, no infinity."""
        return {
            "total": asdict(self.total),
            "roles": [asdict(fit) for fit in self.roles],
            "paths": list(self.paths),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def plot(self) -> Figure:
        """Mean effective rank against rank, both logarithmic: points with standard errors over modules, and the fits.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(8, 5)
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for fit, colour in [(fit, f"C{i}") for i, fit in enumerate(self.roles)] + [(self.total, "k")]:
            if not fit.points:
                continue
            x = [point.rank for point in fit.points]
            label = escape_mathtext(fit.name)
            if fit.law is not None:
                label += f": {fit.law.a:.3g} · r^{fit.law.beta:.3f}, R² = {fit.law.r_squared:.4f}"
            axes.errorbar(
                x,
                [point.effective_rank for point in fit.points],
                yerr=[point.stderr or 0.0 for point in fit.points],
                fmt="s" if fit is self.total else "o",
                ms=4,
                capsize=2,
                color=colour,
                label=label,
            )
            if fit.law is not None:
                ends = [min(x), max(x)]
                axes.plot(ends, [fit.law(rank) for rank in ends], color=colour, lw=1.5 if fit is self.total else 0.8)
        axes.set(xlabel="rank r", ylabel="mean effective rank", title="Effective rank against rank")
        ranks = sorted({point.rank for point in self.total.points})
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.yaxis.set_major_formatter("{x:g}")
        if self.total.points:
            values = [point.effective_rank for fit in (*self.roles, self.total) for point in fit.points]
            axes.set_ylim(2 ** math.floor(math.log2(min(values))), 2 ** (math.floor(math.log2(max(values))) + 1))
            axes.legend(fontsize=8)
        return figure


def scaling_law(adapters: Source | Sequence[Source]) -> ScalingLawReport:
    """Fit r̂ = a · r^β to adapters of one task and model that were trained at different ranks.

    Every module counts at its own rank, so that an adapter with a `rank_pattern` is at several, and may be alone. As in
    the paper, the fit is to the mean effective rank at each rank: over all modules, and for each role. Where not the
    same modules are at every rank, a fit mixes what rank does with what the modules do: the findings say so, as they do
    of different base models. Updates that are zero, or not finite, are left out and among the findings. Of DoRA and
    SPECLORA it is the low-rank part.

    Args:
        adapters: directories, files, Hub ids, PeftModels or open adapters; of several adapters in one model
            ``[lorakit.adapters.open_adapter(model, adapter_name=name) for name in names]``.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read; ValueError for no adapters.
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
            message = f"{zero} updates are zero, have no rank to speak of and are left out of the fits."
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
            f"all modules have rank {points[0].rank}; a law needs adapters of two ranks or more"
            if points
            else "no module has an update that is finite and not zero"
        )
        findings.append(Finding("info", "no_fit", None, f"{name}: there is no fit, as {reason}."))
        return LawFit(name, None, None, points, reason)
    if len({frozenset(row.module_name for row in group) for group in by_rank.values()}) > 1:
        message = f"{name}: not the same modules are at every rank, so that the fit mixes ranks with modules."
        findings.append(Finding("warning", "mixed_modules", None, message))
    if len(points) == 2:
        message = f"{name}: two ranks fix the law, and R² = 1 says nothing."
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
    """√(Σ residual² / (n − 2) / Σ (x − x̄)²), of the logarithms."""
    if len(points) < 3:
        return None
    x = [math.log(point.rank) for point in points]
    residual = sum(math.log(point.effective_rank / law(point.rank)) ** 2 for point in points)
    spread = sum((value - statistics.fmean(x)) ** 2 for value in x)
    return math.sqrt(residual / (len(points) - 2) / spread)
