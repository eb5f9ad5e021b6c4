"""Experts in a comparison: one row for each of them, or one for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lorakit.adapters.experts import expert_group
from lorakit.lens.static.comparison_report import ComparedExperts, ComparedModule, summarize
from lorakit.lens.static.experts import QUANTILES
from lorakit.lens.static.verdicts import VERDICTS

_SPREAD = ("cosine", "output_overlap", "input_overlap", "share_a")


def groups(rows: Sequence[ComparedModule]) -> tuple[ComparedModule, ...]:
    """The experts of each stack, and those that are modules of one layer and one name, as one row."""
    members: dict[str, list[ComparedModule]] = {}
    for row in rows:
        members.setdefault(_group_of(row) or row.module_name, []).append(row)
    return tuple(group[0] if _group_of(group[0]) is None else _group(name, group) for name, group in members.items())


def _group_of(row: ComparedModule) -> str | None:
    found = expert_group(row.module_name)
    return row.stack or (None if found is None else found[0])


def _group(name: str, rows: Sequence[ComparedModule]) -> ComparedModule:
    """One row for several experts: cosine and norms of all their updates together, means of overlaps, largest spectral
    norms, and the verdict of most experts, of equally many the graver one.
    """
    first = rows[0]
    judged = [row for row in rows if row.verdict is not None]
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    shared = ComparedModule(
        module_name=name,
        role=first.role,
        layer=first.layer,
        kind=first.kind,
        d_out=first.d_out,
        d_in=first.d_in,
        rank_a=max(row.rank_a for row in rows),
        rank_b=max(row.rank_b for row in rows),
        low_rank_part_only=any(row.low_rank_part_only for row in rows),
        whole_update=any(row.whole_update for row in rows),
        experts=ComparedExperts(len(rows), counts, _quantiles(judged)),
    )
    if len(judged) < len(rows):
        return shared
    together = summarize(name, rows)
    verdict = max(reversed(VERDICTS), key=lambda one: (counts[one], one == "conflicting"))
    return replace(
        shared,
        verdict=verdict,
        reason=next(row.reason for row in rows if row.verdict == verdict),
        directions_a=max(row.directions_a or 0 for row in rows),
        directions_b=max(row.directions_b or 0 for row in rows),
        cosine=together.cosine,
        random_cosine=together.random_cosine,
        output_overlap=together.output_overlap_mean,
        input_overlap=together.input_overlap_mean,
        random_output_overlap=together.random_output_overlap_mean,
        random_input_overlap=together.random_input_overlap_mean,
        frobenius_norm_a=together.frobenius_norm_a,
        frobenius_norm_b=together.frobenius_norm_b,
        share_a=together.share_a,
        spectral_norm_a=max(row.spectral_norm_a or 0.0 for row in rows),
        spectral_norm_b=max(row.spectral_norm_b or 0.0 for row in rows),
        sigma_ratio=None if any(row.sigma_ratio is None for row in rows) else max(row.sigma_ratio or 1 for row in rows),
    )


def _quantiles(rows: Sequence[ComparedModule]) -> dict[str, dict[str, float]]:
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    found = {}
    for name in _SPREAD:
        known = [value for row in rows if (value := getattr(row, name)) is not None]
        if known:
            values = torch.tensor(known, dtype=torch.float64).quantile(shares).tolist()
            found[name] = dict(zip(QUANTILES, values, strict=True))
    return found
