"""Audit an adapter: read and parse it, then spectra, findings, suggestions, report. No base model, no data.

References: Gradience (stable rank, utilization, energy ranks); LoRA-Lens (effective rank, capacity utilization).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lorakit._checks import check_number
from lorakit._report import ordered
from lorakit.adapters import Adapter, open_adapter
from lorakit.adapters.base_norms import base_norms
from lorakit.adapters.whole import with_whole_updates
from lorakit.allocation.budget import read_budget
from lorakit.lens._curvature import CurvatureSource, about_partial_updates, read_curvature
from lorakit.lens._rows import grouped
from lorakit.lens.static import experts
from lorakit.lens.static.findings import find, find_served_wrong
from lorakit.lens.static.groups import summarize, total_norm
from lorakit.lens.static.recommendation import recommend
from lorakit.lens.static.report import AuditReport
from lorakit.lens.static.spectra import AuditedModule, check_extras, measure
from lorakit.lens.static.suggestions import suggest, with_loss_gaps

if TYPE_CHECKING:
    from torch import nn

THRESHOLDS = (0.9, 0.95, 0.99)


def audit(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    energy: float = 0.9,
    suggest_ranks: bool = False,
    budget: int | str | None = None,
    curvature: CurvatureSource | None = None,
    by: Literal["group", "expert"] = "group",
    adapter_name: str | None = None,
) -> AuditReport:
    """Measure an adapter's updates ΔW from its factors, and say what stands out and which ranks would do.

    For each module, role and layer: norms, stable and effective rank, capacity utilization CU = effective rank / r,
    utilization = stable rank / r, energy ranks k@q (the smallest rank that keeps the share q of ‖ΔW‖_F²) and the knee
    of the spectrum. ΔW includes the scaling. For DoRA and SPECLORA without `base` the numbers are those of the low-rank
    part, and the report says so. Problems with the adapter are findings; only what cannot be read at all raises an
    error.

    Args:
        adapter: a directory, a .safetensors or .bin file, a Hub id, a PeftModel, or an open `lorakit.adapters.Adapter`.
        base: the base model, as a directory, a .safetensors file or a module: DoRA and SPECLORA are then measured by
            their whole updates, and norms are also relative to those of its weights, which for a base on disk are
            computed once and kept in a cache file.
        energy: the share of each ‖ΔW‖_F² that suggested ranks keep, in addition to k@0.9, k@0.95 and k@0.99.
        suggest_ranks: also suggest ranks: global median and p90, per module, by knee, by entropy and by the optimal
            hard threshold; and recommend one of them.
        budget: also suggest ranks under a budget, by greedy energy per parameter: a number of parameters, or a string
            such as "2M" (parameters) or "4MB" (bytes, in the dtype the factors are stored in). Implies `suggest_ranks`.
        curvature: also bound what the suggested ranks may cost in loss: a `lorakit.lens.Curvature` of all weights
            together, or one of each of some modules, which `lorakit.experiments.pilot.hessian_spectrum(module=…)`
            measures. They are local estimates, of a cut at a minimum of the loss. Implies `suggest_ranks`.
        by: "expert" gives every expert a row; otherwise the experts of one parameter, or of one name and layer, are
            one row, with quantiles over them.
        adapter_name: which adapter of a PeftModel; by default the active one.
    Raises: AdapterFileError, UnsupportedModelError for an adapter that cannot be read; ValueError for an `energy`
        outside (0, 1], a budget that does not cover rank 1 in every module, an unknown `by`, or a `curvature` of
        modules that the adapter lacks; TypeError for a `curvature` of another type.

    Example:
        >>> import lorakit, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
        >>> _ = torch.nn.init.eye_(model.base_model.model[0].lora_B["default"].weight)
        >>> report = lorakit.lens.audit(model)
        >>> report.modules[0].energy_rank["0.9"]
        2
    """
    check_number("energy", energy, above=0, most=1)
    if budget is not None:
        read_budget(budget)
    if by not in ("group", "expert"):
        raise ValueError(f"`by` must be 'group' or 'expert'; got {by!r}.")
    thresholds = {str(q): q for q in sorted({*THRESHOLDS, float(energy)})}

    view = open_adapter(adapter, adapter_name=adapter_name)
    whole = with_whole_updates(view, base)
    findings = list(whole.findings)
    measured = measure(whole, thresholds, findings)
    if base is not None:
        norms = base_norms(base, view.modules)
        measured = tuple(_relative(row, norms.get(row.module_name)) for row in measured)
    check_extras(view, findings)
    modules = experts.stacks(measured)
    findings += [*find(modules), *find_served_wrong(view)]
    finite = [row for row in modules if row.energy_rank is not None]
    bounds = read_curvature(curvature, [row.module_name for row in modules])
    findings += about_partial_updates(bounds, modules)
    wanted = suggest_ranks or budget is not None or bool(bounds)
    suggestions = suggest(finite, str(float(energy)), budget) if wanted else []
    suggestions = [with_loss_gaps(suggestion, finite, bounds) for suggestion in suggestions]
    rows = measured if by == "expert" else experts.groups(measured)
    groups, layers = grouped(rows)
    norm = total_norm(rows)
    return AuditReport(
        path=view.path,
        peft_type=view.settings.peft_type,
        base_model=view.settings.base_model,
        base=os.fspath(base) if isinstance(base, str | os.PathLike) else None,
        energy=energy,
        modules=rows,
        total=summarize("all", rows, norm),
        roles=tuple(summarize(name, group, norm) for name, group in groups.items()),
        layers=tuple(summarize(name, group, norm) for name, group in layers.items()),
        parameters_beside=sum(extra.info.numel for extra in view.extras)
        + sum(info.numel for module in view.modules for info in module.extras),
        suggestions=tuple(suggestions),
        recommendation=recommend(suggestions, {row.module_name: row.rank for row in finite}, energy),
        findings=ordered(findings),
        curvature=bounds,
    )


def _relative(row: AuditedModule, base_norm: float | None) -> AuditedModule:
    if not base_norm or row.frobenius_norm is None:
        return row
    return replace(row, base_norm=base_norm, relative_norm=row.frobenius_norm / base_norm)
