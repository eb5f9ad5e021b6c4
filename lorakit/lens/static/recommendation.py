"""Which suggestion to follow, why, and how far the policies agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.lens.static.suggestions import RankSuggestion

COVERED = 0.9  # share of the modules that must keep the requested energy


@dataclass(frozen=True)
class Recommendation:
    """The one suggestion to follow first, by its policy, and why.

    `agreement`: for each pair of policies, "a / b", the mean over modules of the smaller rank over the larger one; 1
    where they suggest the same ranks.
    """

    policy: str
    reason: str
    agreement: dict[str, float]


def recommend(suggestions: Sequence[RankSuggestion], own: dict[str, int], energy: float) -> Recommendation | None:
    """The budget's suggestion if there is one; else the lowest common rank that keeps the energy in 9 of 10 modules.

    A common rank comes first because every server loads it. `own` are the modules' ranks. None if nothing is suggested,
    or if no suggestion is below the adapter's own ranks.
    """
    agreement = {
        f"{a.policy} / {b.policy}": agreement_of(a, b) for i, a in enumerate(suggestions) for b in suggestions[i + 1 :]
    }
    budget = next((s for s in suggestions if s.policy == "budget"), None)
    if budget is not None:
        covered = f"{budget.modules_covered} of {len(budget.ranks)}"
        reason = f"it fits the budget; {covered} modules keep {energy:.0%} of their energy"
        return Recommendation("budget", reason, agreement)
    common = [s for s in suggestions if s.rank is not None and s.modules_covered >= COVERED * len(s.ranks) - 1e-9]
    if not common:
        return None
    best = min(common, key=lambda s: s.parameters)
    if all(best.ranks[name] >= rank for name, rank in own.items()):
        return None
    others = [s for s in suggestions if s.rank is None]
    below = sum(statistics.median(s.ranks.values()) <= (best.rank or 0) for s in others)
    reason = (
        f"the lowest common rank that keeps {energy:.0%} of the energy in nine tenths of the modules, and every server "
        f"loads one rank; {below} of {len(others)} policies by module suggest no more in the median module"
    )
    return Recommendation(best.policy, reason, agreement)


def agreement_of(a: RankSuggestion, b: RankSuggestion) -> float:
    """The mean over modules of the smaller of two suggested ranks over the larger one."""
    return statistics.fmean(min(k, b.ranks[name]) / max(k, b.ranks[name]) for name, k in a.ranks.items())
