"""Scores, costs and a budget → integer ranks. Pure: numbers in, numbers out, so that a config can use it too."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Rule = Literal["energy"]
Unit = Literal["parameters", "bytes"]

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?(b?)\s*", re.IGNORECASE)


def allocate(
    scores: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    *,
    rule: Rule = "energy",
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Ranks for all modules, at least `min_rank` each, whose cost Σ rank · cost does not exceed `budget`.

    Units of rank are taken in the order of their gain per cost, each module's in turn; where a unit does not fit, it
    is skipped and the next is tried. Ties go to the module that comes first. Units that gain nothing are not taken.

    Args:
        scores: for each module, what `rule` makes gains of. "energy": singular values, in any order; unit k gains the
            k-th largest squared, and a module has as many units as values.
        costs: for each module, what one unit of rank costs, such as d_in + d_out parameters.
        budget: in the unit of `costs`.
        max_rank: an upper bound for every module.
    Raises: ValueError for a budget that does not cover `min_rank` everywhere, and for arguments that make no sense.
    """
    if set(scores) != set(costs):
        raise ValueError(f"`scores` and `costs` must have the same modules; they differ in {set(scores) ^ set(costs)}.")
    if rule not in _GAINS:
        raise ValueError(f"`rule` must be one of {', '.join(_GAINS)}; got {rule!r}.")
    if min_rank < 0 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"`min_rank` must be in [0, `max_rank`]; got {min_rank} with `max_rank` {max_rank}.")
    if any(cost <= 0 for cost in costs.values()):
        raise ValueError("`costs` must be positive.")
    gains = _GAINS[rule](scores)
    ranks = dict.fromkeys(scores, min_rank)
    left = budget - sum(costs[name] * min_rank for name in scores)
    if left < 0:
        raise ValueError(
            f"`budget` must cover rank {min_rank} in all {len(scores)} modules (at least {budget - left}); got "
            f"{budget}. Raise it{' or lower `min_rank`' if min_rank else ''}."
        )
    limits = {name: len(gain) if max_rank is None else min(len(gain), max_rank) for name, gain in gains.items()}
    names = list(scores)
    heap = [
        (-gains[name][min_rank] / costs[name], order) for order, name in enumerate(names) if min_rank < limits[name]
    ]
    heapq.heapify(heap)
    while heap:
        gain, order = heapq.heappop(heap)
        name = names[order]
        if gain == 0:
            break
        if costs[name] > left:  # nor will the module's later units fit
            continue
        left -= costs[name]
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(heap, (-gains[name][ranks[name]] / costs[name], order))
    return ranks


def _energy_gains(spectra: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """σ² of each component, descending, relative to the largest of all modules."""
    peak = max((value for spectrum in spectra.values() for value in spectrum), default=0.0) or 1.0
    return {
        name: [(value / peak) ** 2 for value in sorted(spectrum, reverse=True)] for name, spectrum in spectra.items()
    }


_GAINS: dict[str, Callable[[Mapping[str, Sequence[float]]], dict[str, list[float]]]] = {"energy": _energy_gains}


def read_budget(budget: int | str) -> tuple[int, Unit]:
    """A budget as people write it: ``2000000`` or ``"2M"`` parameters, ``"4MB"`` or ``"4MiB"`` bytes.

    Raises: ValueError for anything else, and for nothing at all.
    """
    match = _BUDGET.fullmatch(str(budget)) if isinstance(budget, int | str) and not isinstance(budget, bool) else None
    amount = int(float(match[1]) * _PREFIXES[(match[2] or "").lower()]) if match else 0
    if match is None or amount < 1:
        raise ValueError(
            f"`budget` must be a positive number of parameters (2000000, 2M) or bytes (4MB, 4MiB); got {budget!r}."
        )
    return amount, "bytes" if match[3] else "parameters"
