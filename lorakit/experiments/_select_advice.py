"""What to try after a rank selection, in the order of its reference, each with the measurement that calls for it.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, rank selection strategy, and METHODS:
ranks in bottleneck layers, more modules, biases and norms, full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorakit.experiments._marginal_gains import MarginalGains
from lorakit.experiments._patterns import Pattern
from lorakit.experiments._select_report import Advice


def advice_of(
    model: nn.Module,
    template: Any,
    modules: Sequence[str],
    patterns: Mapping[str, Pattern | None],
    gains: MarginalGains | None,
) -> tuple[Advice, ...]:
    """The four steps. All but the first are called for if a set still gains at the largest rank of the sweep.

    That is what the reference calls a persistent truncation error. Each is called for only where what comes before it
    is done or does not help.
    """
    helped = (
        []
        if gains is None
        else [(group, name, one) for group in gains.groups for name, one in group.by_set.items() if one.lower > 0]
    )
    if helped:
        group, name, one = max(helped, key=lambda found: found[0].per_parameter)
        first = f"{group.name} gains {one.difference:.4g} on {name} (lower bound {one.lower:.4g})"
    else:
        first = "not measured" if gains is None else "no group's gain has a lower bound above 0"
    others = untargeted(model, modules)
    shapes = ", ".join(f"{name} {pattern or 'without a pattern'}" for name, pattern in patterns.items()) or "no sweep"
    more = "gradual" in patterns.values() and not helped
    trained = template.bias != "none"
    return (
        Advice("more rank in bottleneck groups", bool(helped), first),
        Advice("more modules", more and others > 0, f"sweeps: {shapes}; {others} linear modules have no adapter"),
        Advice(
            "train biases and norms",
            more and not others and not trained,
            f"sweeps: {shapes}; {others} linear modules have no adapter; bias={template.bias!r}",
        ),
        Advice(
            "full fine-tuning",
            more and not others and trained,
            f"sweeps: {shapes}; called for only when the steps before it are done",
        ),
    )


def untargeted(model: nn.Module, modules: Sequence[str]) -> int:
    """How many linear modules have no adapter, the output head not counted."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    wanted = set(modules)
    return sum(
        isinstance(module, nn.Linear) and module is not head and name not in wanted
        for name, module in model.named_modules()
    )
