"""Spectra, ranks and findings of an adapter, from its factors alone: no base model, no data.

References: Gradience (stable rank, utilization, energy ranks); LoRA-Lens (effective rank, capacity utilization).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakit._report import ordered
from lorakit.adapters import Adapter, open_adapter
from lorakit.allocation.budget import read_budget
from lorakit.errors import Finding
from lorakit.lens._rows import grouped
from lorakit.lens.static.measure import check_extras, measure
from lorakit.lens.static.report import AuditedModule, AuditReport, summarize
from lorakit.lens.static.suggestions import suggest

if TYPE_CHECKING:
    from torch import nn

THRESHOLDS = (0.9, 0.95, 0.99)
UNUSED_BELOW = 0.25  # utilization: much room
DOMINANT_ABOVE = 0.5  # of Σ ‖ΔW‖_F², with MANY modules or more
MANY = 4


def audit(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    *,
    energy: float = 0.9,
    suggest_ranks: bool = False,
    budget: int | str | None = None,
    adapter_name: str | None = None,
) -> AuditReport:
    """Audit an adapter: a directory, a file, a Hub id, a PeftModel, or an open `lorakit.adapters.Adapter`.

    Per module, role and layer: norms, stable and effective rank, capacity utilization CU = effective rank / r,
    utilization = stable rank / r, energy ranks k@q, and the knee of the spectrum; all of ΔW, scaling included. Of DoRA
    and SPECLORA it is the low-rank part, and labelled so. What is wrong with the adapter is among the findings; only
    what cannot be read at all is an error.

    Args:
        energy: the share of each ‖ΔW‖_F² that suggested ranks keep, beside k@0.9, 0.95 and 0.99.
        suggest_ranks: also suggest ranks: global median and p90, per module, by knee and by entropy.
        budget: also suggest ranks under a budget, by greedy energy per parameter: a number of parameters, or a string
            such as "2M" (parameters) or "4MB" (bytes, in the dtype they are stored in). Implies `suggest_ranks`.
        adapter_name: which adapter of a PeftModel, if not the active one.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read; ValueError for an `energy` outside (0, 1],
        or a budget that does not cover rank 1 in every module.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be a share in (0, 1]; got {energy}.")
    if budget is not None:
        read_budget(budget)
    view = open_adapter(adapter, adapter_name=adapter_name)
    findings = list(view.findings)
    thresholds = {str(q): q for q in sorted({*THRESHOLDS, float(energy)})}
    rows = measure(view, thresholds, findings)
    check_extras(view, findings)
    findings += _about_modules(rows)
    wanted = suggest_ranks or budget is not None
    finite = [row for row in rows if row.energy_rank is not None]
    groups, layers = grouped(rows)
    return AuditReport(
        path=view.path,
        peft_type=view.settings.peft_type,
        base_model=view.settings.base_model,
        energy=energy,
        modules=rows,
        total=summarize("all", rows, rows),
        roles=tuple(summarize(name, group, rows) for name, group in groups.items()),
        layers=tuple(summarize(name, group, rows) for name, group in layers.items()),
        parameters_beside=sum(extra.info.numel for extra in view.extras)
        + sum(info.numel for module in view.modules for info in module.extras),
        suggestions=tuple(suggest(finite, str(float(energy)), budget)) if wanted else (),
        findings=ordered(findings),
    )


def _about_modules(rows: tuple[AuditedModule, ...]) -> Iterator[Finding]:
    for row in rows:
        if row.rank > min(row.d_out, row.d_in):
            message = (
                f"{row.module_name}: rank {row.rank} is above min(d_out, d_in) = {min(row.d_out, row.d_in)}, which is "
                f"all that an update can have."
            )
            yield Finding("warning", "rank_above_dimension", row.module_name, message)
    partial = [row for row in rows if row.low_rank_part_only]
    if partial:
        kinds = sorted({label for row in partial for label in row.beside if label != "lora_bias"})
        message = (
            f"Of {len(partial)} modules only the low-rank part is measured, with statistics of "
            f"{' and '.join(kinds) or 'what is beside it'}: the whole update needs the base weight."
        )
        yield Finding("info", "low_rank_part_only", None, message)
    trained = [row for row in rows if row.frobenius_norm]
    if not trained:
        return
    largest = max(trained, key=lambda row: row.frobenius_norm or 0.0)
    peak = largest.frobenius_norm or 1.0
    share = 1 / sum(((row.frobenius_norm or 0.0) / peak) ** 2 for row in trained)
    if share > DOMINANT_ABOVE and len(trained) >= MANY:
        message = f"{largest.module_name} has {share:.0%} of the energy Σ ‖ΔW‖_F² of all {len(trained)} modules."
        yield Finding("warning", "dominant_module", largest.module_name, message)
    unused = [row for row in trained if (row.utilization or 0.0) < UNUSED_BELOW]
    if 2 * len(unused) > len(trained):
        message = (
            f"{len(unused)} of {len(trained)} modules use less than {UNUSED_BELOW:.0%} of their rank (stable rank / r)."
        )
        yield Finding("info", "unused_capacity", None, message)
