"""Stacks of experts, taken apart for measuring and put together again in findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorakit._checks import preview
from lorakit.adapters import AdapterModule
from lorakit.adapters.experts import expert_name
from lorakit.errors import Finding
from lorakit.spectral import LowRank


def one_by_one(modules: list[AdapterModule], update: LowRank) -> tuple[list[AdapterModule], LowRank]:
    """A batch of stacks as a batch of their experts, each under a name of its own; other batches as they are."""
    if update.B.ndim < 4:
        return modules, update
    experts = [replace(m, name=expert_name(m.name, e)) for m in modules for e in range(m.experts or 1)]
    scaling = update.scaling.flatten() if isinstance(update.scaling, Tensor) else update.scaling
    return experts, LowRank(update.B.flatten(0, 1), update.A.flatten(0, 1), scaling)


def merged_findings(findings: Sequence[Finding], modules: Sequence[AdapterModule]) -> list[Finding]:
    """Findings about several experts of one stack as one finding."""
    stack_of = {expert_name(m.name, e): m for m in modules if m.experts is not None for e in range(m.experts)}
    together: dict[tuple[str, str, str], list[Finding]] = {}
    kept: list[Finding] = []
    for finding in findings:
        stack = stack_of.get(finding.module_name or "")
        if stack is None:
            kept.append(finding)
        else:
            text = finding.message.partition(": ")[2]
            together.setdefault((finding.code, stack.name, text), []).append(finding)
    for (code, name, text), group in together.items():
        if len(group) == 1:
            kept.append(group[0])
            continue
        names = [finding.module_name or "" for finding in group]
        message = f"{name}: in {len(group)} experts, {text.removesuffix('.')}: {preview(names)}"
        kept.append(Finding(group[0].severity, code, name, message))
    return kept
