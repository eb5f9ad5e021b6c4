"""Experts in an audit: one row for each of them, or one for each group with quantiles over its experts.

A group is the experts stacked in one parameter, or the modules ``….experts.0.w1``, ``….experts.1.w1``, … of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lorakit._format import number
from lorakit._report import Table
from lorakit.adapters.experts import expert_group, group_spectrum
from lorakit.lens.static.spectra import AuditedModule, ExpertSpread

QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
_SPREAD = ("frobenius_norm", "stable_rank", "effective_rank", "capacity_utilization")


def stacks(rows: Sequence[AuditedModule]) -> tuple[AuditedModule, ...]:
    """The experts of each stack as one row: a stack is written at one rank."""
    return _collapsed(rows, lambda row: row.stack)


def groups(rows: Sequence[AuditedModule]) -> tuple[AuditedModule, ...]:
    """The experts of each stack, and those that are modules of one layer and one name, as one row."""

    def group(row: AuditedModule) -> str | None:
        found = expert_group(row.module_name)
        return row.stack or (None if found is None else found[0])

    return _collapsed(rows, group)


def expert_table(rows: Sequence[AuditedModule]) -> Table:
    """One row for each group: how its experts differ."""

    def spread(name: str) -> Callable[[AuditedModule], str]:
        def write(row: AuditedModule) -> str:
            found = row.experts.quantiles.get(name) if row.experts else None
            return "" if found is None else " / ".join(number(found[q]) for q in ("min", "median", "max"))

        return write

    columns: list[tuple[str, Callable[[AuditedModule], str]]] = [
        ("group", lambda m: m.module_name),
        ("experts", lambda m: str(m.experts.count if m.experts else "")),
        ("zero", lambda m: str(m.experts.zero if m.experts else "")),
        ("‖ΔW‖_F", spread("frobenius_norm")),
        ("stable", spread("stable_rank")),
        ("effective", spread("effective_rank")),
        ("CU", spread("capacity_utilization")),
    ]
    note = "Least, median and largest of the experts whose update is finite; `by='expert'` has a row for each."
    return Table.of("Experts", columns, [row for row in rows if row.experts is not None], note=note)


def _collapsed(
    rows: Sequence[AuditedModule], group_of: Callable[[AuditedModule], str | None]
) -> tuple[AuditedModule, ...]:
    members: dict[str, list[AuditedModule]] = {}
    for row in rows:
        members.setdefault(group_of(row) or row.module_name, []).append(row)
    return tuple(_group(name, group) if group_of(group[0]) is not None else group[0] for name, group in members.items())


def _group(name: str, rows: Sequence[AuditedModule]) -> AuditedModule:
    """One row for several experts.

    Norms and singular values are of their updates together, the block of experts: σ_k is √Σ_e σ_ek², whose squares are
    what each unit of rank adds. Stable and effective rank, utilization and knee are medians over the experts, and an
    energy rank is the one that every expert's energy needs.
    """
    first = rows[0]
    finite = [row for row in rows if row.energy_rank is not None]
    shared = replace(
        first,
        module_name=name,
        stack=None,
        rank=max(row.rank for row in rows),
        parameters=sum(row.parameters for row in rows),
        low_rank_part_only=any(row.low_rank_part_only for row in rows),
        beside=first.beside if first.stack else {},
        base_norm=None,
        relative_norm=None,
        experts=ExpertSpread(len(rows), sum(row.frobenius_norm == 0 for row in rows), _quantiles(finite)),
    )
    if len(finite) < len(rows):
        return _without_numbers(shared)
    length = max(len(row.singular_values) for row in rows)
    sigma = torch.zeros(len(rows), length, dtype=torch.float64)
    for i, row in enumerate(rows):
        sigma[i, : len(row.singular_values)] = torch.tensor(row.singular_values, dtype=torch.float64)
    return replace(
        shared,
        singular_values=tuple(group_spectrum(sigma).tolist()),
        frobenius_norm=math.hypot(*(row.frobenius_norm or 0.0 for row in rows)),
        spectral_norm=max(row.spectral_norm or 0.0 for row in rows),
        stable_rank=_median([row.stable_rank or 0.0 for row in rows]),
        effective_rank=_median([row.effective_rank or 0.0 for row in rows]),
        capacity_utilization=_median([row.capacity_utilization or 0.0 for row in rows]),
        utilization=_median([row.utilization or 0.0 for row in rows]),
        energy_rank={q: max((row.energy_rank or {})[q] for row in rows) for q in first.energy_rank or {}},
        knee=round(_median([float(row.knee or 0) for row in rows])),
        top1_share=_median([row.top1_share or 0.0 for row in rows]),
        hard_threshold_rank=max(row.hard_threshold_rank or 0 for row in rows),
    )


def _without_numbers(row: AuditedModule) -> AuditedModule:
    """A group with an expert that is not finite has no numbers, as such a module has none."""
    return replace(
        row,
        singular_values=(),
        frobenius_norm=None,
        spectral_norm=None,
        stable_rank=None,
        effective_rank=None,
        capacity_utilization=None,
        utilization=None,
        energy_rank=None,
        knee=None,
        top1_share=None,
        hard_threshold_rank=None,
    )


def _quantiles(rows: Sequence[AuditedModule]) -> dict[str, dict[str, float]]:
    if not rows:
        return {}
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    found = {}
    for name in _SPREAD:
        values = torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
        found[name] = dict(zip(QUANTILES, values.quantile(shares).tolist(), strict=True))
    for q in rows[0].energy_rank or {}:
        values = torch.tensor([float((row.energy_rank or {})[q]) for row in rows], dtype=torch.float64)
        ranks = values.quantile(shares, interpolation="higher").tolist()
        found[f"energy_rank {q}"] = dict(zip(QUANTILES, ranks, strict=True))
    return found


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
