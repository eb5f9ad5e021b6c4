"""Integer ranks from scores, costs and a budget. Numbers only: no models, no files.

Every rule buys units of rank one at a time, always the unit with the largest gain per cost. A unit that does not fit
into the rest of the budget is skipped. The rules differ in what a unit gains.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lorakit._checks import check_integer
from lorakit.allocation.report import RULES, AllocatedModule, Allocation, Per, Rule
from lorakit.errors import AllocationError

# Which roles get their ranks first; None stands for all other roles. "Keep V, reduce Q", and its control.
_ORDERS: dict[str, tuple[str | None, ...]] = {
    "fisherlora": ("value", None, "query"),
    "spectral": ("query", None, "value"),
}


@dataclass(frozen=True)
class _Group:
    """Modules that share one rank. `gain(r)` is what rank r + 1 adds to rank r; 0 means that nothing is left."""

    names: list[str]
    cost: int
    limit: float
    tier: int
    gain: Callable[[int], float]


def allocate(
    scores: Mapping[str, float] | Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    *,
    rule: Rule = "energy",
    min_rank: int = 1,
    max_rank: int | Mapping[str, int] | None = None,
    per: Per = "module",
    roles: Mapping[str, str | None] | None = None,
    d_out: Mapping[str, int] | None = None,
) -> Allocation:
    """Ranks for all modules, at least `min_rank` each, whose total cost Σ rank · cost stays within `budget`.

    The result depends neither on the order of the modules nor on the scale of the scores. Ties go to the name that
    comes first (layer 2 before layer 10). Units that gain nothing are not bought.

    Args:
        scores: each module's score, a finite number >= 0; for "energy" a sequence of them.
        costs: what one unit of rank costs in each module, for instance d_in + d_out parameters.
        budget: in the unit of `costs`.
        rule: what unit r + 1 of a module gains:

            * ``fisher``: F · d_out · (1/r − 1/(r + 1)). The score F is the mean Fisher information of lora_B's entries.
              Ranks then grow as √(F · d_out / cost). Needs `d_out`.
            * ``fisherlora``: keep V, reduce Q. One rank per role: value projections are raised towards `max_rank`
              first, then all other roles together, then query projections. Needs `roles` and `max_rank`.
            * ``spectral``: the control of `fisherlora`, with queries first and values last.
            * ``energy``: the (r + 1)-th largest σ². The score is a trained update's singular values, in any order; a
              module has as many units as values.
            * ``prior``: ranks in proportion to score · √cost (as integers, by the largest quotients over r + ½).
            * ``uniform``: one rank for all modules.
        min_rank: the smallest rank of a module.
        max_rank: an upper bound, for all modules or for each one.
        per: "role" gives all modules of one role the same rank, by the sum of their gains. Needs `roles`.
        roles: each module's role, or None.
        d_out: each module's output width.

    Raises: AllocationError (a ValueError) if the budget does not cover `min_rank` in all modules, if scores are
    negative or not finite, and if arguments do not fit together.
    References: "LoRA-Lens", section 4 (fisherlora, spectral). The greedy gains and the prior follow budgeted rank
    allocation by sensitivity, r ∝ s · √(d_in + d_out).

    Example:
        >>> spectra = {"layers.0.q_proj": [4.0, 1.0, 0.5], "layers.0.v_proj": [3.0, 2.0, 2.0]}
        >>> allocate(spectra, {"layers.0.q_proj": 128, "layers.0.v_proj": 96}, budget=420).ranks
        {'layers.0.q_proj': 1, 'layers.0.v_proj': 3}
    """
    _check_options(rule, per, min_rank, roles, d_out, max_rank)
    by_name = {"costs": costs, "roles": roles, "d_out": d_out, "max_rank": max_rank}
    for argument, mapping in by_name.items():
        if isinstance(mapping, Mapping) and set(mapping) != set(scores):
            differing = sorted(set(scores) ^ set(mapping))
            raise AllocationError(f"`scores` and `{argument}` must have the same modules; they differ in {differing}.")
    for argument, widths in (("costs", costs), ("d_out", d_out or {})):
        for name, value in widths.items():
            _check_positive(f"{argument}[{name!r}]", value)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise AllocationError(f"`budget` must be an integer, in the unit of `costs`; got {budget!r}.")
    values = {name: _numbers(name, score, many=rule == "energy") for name, score in scores.items()}
    limits = _limits(costs, values, rule, min_rank, max_rank)
    gains = _gains(values, costs, d_out, rule)
    groups = _groups(costs, limits, gains, rule, per, roles)
    rank_of, why_of, left = _buy(groups, budget, min_rank)
    rows = []
    for name, cost in costs.items():
        score = sum(v * v for v in values[name]) if rule == "energy" else values[name][0]
        role = None if roles is None else roles[name]
        rows.append(AllocatedModule(name, role, score, cost, rank_of[name], why_of[name]))
    return Allocation(rule, per, budget, budget - left, tuple(rows))


def _check_positive(name: str, value: Any) -> None:
    try:
        check_integer(name, value)
    except ValueError as error:
        raise AllocationError(str(error)) from None


def _check_options(rule: str, per: str, min_rank: Any, roles: Any, d_out: Any, max_rank: Any) -> None:
    if rule not in RULES:
        raise AllocationError(f"`rule` must be one of {', '.join(RULES)}; got {rule!r}.")
    if per not in get_args(Per):
        raise AllocationError(f"`per` must be one of {', '.join(get_args(Per))}; got {per!r}.")
    bounds = [*max_rank.values()] if isinstance(max_rank, Mapping) else [] if max_rank is None else [max_rank]
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (min_rank, *bounds))
    if not whole or min_rank < 0 or any(bound < min_rank for bound in bounds):
        raise AllocationError(
            f"`min_rank` must be an integer in [0, `max_rank`]; got {min_rank!r} with `max_rank` {max_rank!r}."
        )
    if rule == "fisher" and d_out is None:
        raise AllocationError("`d_out`, each module's output width, is required by the rule 'fisher'; got None.")
    if rule == "fisher" and min_rank < 1:
        raise AllocationError("`min_rank` must be at least 1 for the rule 'fisher', whose gain at rank 0 is infinite.")
    if roles is None and (per == "role" or rule in _ORDERS):
        reason = f"the rule {rule!r}" if rule in _ORDERS else "per='role'"
        raise AllocationError(f"`roles` is required by {reason}; got None.")
    if rule in _ORDERS:
        if max_rank is None:
            raise AllocationError(f"`max_rank` is required by the rule {rule!r}; got None.")
        if not {"query", "value"} <= set(roles.values()):
            raise AllocationError(
                f"`roles` must include query and value projections for the rule {rule!r}; got "
                f"{sorted({str(role) for role in roles.values()})}. Use 'fisher', 'prior' or 'uniform'."
            )


def _numbers(name: str, score: Any, *, many: bool) -> list[float]:
    numbers = score if many else [score]
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise AllocationError(
            f"`scores` must be sequences of singular values for 'energy'; got {score!r} for {name!r}."
        )
    if not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in numbers):
        raise AllocationError(f"`scores` must be finite and not negative; got {score!r} for {name!r}.")
    return sorted(map(float, numbers), reverse=True)


def _limits(
    costs: Mapping[str, int], values: Mapping[str, list[float]], rule: str, min_rank: int, max_rank: Any
) -> dict[str, float]:
    limits: dict[str, float] = {}
    for name in costs:
        given = max_rank[name] if isinstance(max_rank, Mapping) else max_rank
        units = len(values[name]) if rule == "energy" else math.inf
        limits[name] = units if given is None else min(units, given)
    return limits


def _gains(
    values: Mapping[str, list[float]], costs: Mapping[str, int], d_out: Mapping[str, int] | None, rule: str
) -> dict[str, Callable[[int], float]]:
    """What unit r + 1 of each module gains, relative to the largest score so that nothing under- or overflows."""
    peak = max((value for numbers in values.values() for value in numbers), default=0.0) or 1.0

    def of(name: str) -> Callable[[int], float]:
        relative = [value / peak for value in values[name]]
        if rule == "energy":
            return lambda r: relative[r] ** 2
        if rule == "fisher":
            mass = relative[0] * (d_out or {})[name]
            return lambda r: mass / (r * (r + 1))
        if rule == "prior":  # per cost, this is score · √cost / (r + ½)
            weight = relative[0] * costs[name] ** 1.5
            return lambda r: weight / (r + 0.5)
        return lambda r: 1.0

    return {name: of(name) for name in costs}


def _groups(
    costs: Mapping[str, int],
    limits: Mapping[str, float],
    gains: Mapping[str, Callable[[int], float]],
    rule: str,
    per: str,
    roles: Mapping[str, str | None] | None,
) -> list[_Group]:
    """Groups of modules that share a rank; a module without a role is a group of its own."""
    order = _ORDERS.get(rule)
    members: dict[tuple[int, str], list[str]] = {}
    for name in sorted(costs, key=natural):
        role = None if roles is None else roles[name]
        if rule == "uniform":
            key = (0, "all")
        elif order is not None:
            key = (order.index(role if role in order else None), "")
        else:
            key = (0, f"role {role}") if per == "role" and role is not None else (0, f"module {name}")
        members.setdefault(key, []).append(name)

    def together(names: list[str]) -> Callable[[int], float]:
        return lambda r: math.fsum(gains[name](r) for name in names)

    return [
        _Group(names, sum(costs[n] for n in names), min(limits[n] for n in names), tier, together(names))
        for (tier, _), names in members.items()
    ]


def _buy(groups: list[_Group], budget: int, min_rank: int) -> tuple[dict[str, int], dict[str, str], int]:
    """Every module's rank, why it is not larger, and the rest of the budget."""
    left = budget - sum(group.cost for group in groups) * min_rank
    if left < 0:
        count = sum(len(group.names) for group in groups)
        raise AllocationError(
            f"`budget` must cover rank {min_rank} in all {count} modules (at least {budget - left}); got "
            f"{budget}. Raise it{' or lower `min_rank`' if min_rank else ''}."
        )
    ranks = [min_rank] * len(groups)
    why = [""] * len(groups)
    heap: list[tuple[int, float, int]] = []

    def offer(i: int) -> None:
        group, rank = groups[i], ranks[i]
        if rank >= group.limit:
            why[i] = f"the largest rank allowed is {group.limit}"
            return
        gain = group.gain(rank) / group.cost
        if gain == 0:
            why[i] = "another unit gains nothing"
            return
        heapq.heappush(heap, (group.tier, -gain, i))

    for i in range(len(groups)):
        offer(i)
    while heap:
        _, negative, i = heapq.heappop(heap)
        group = groups[i]
        if group.cost > left:  # the group's later units do not fit either
            together = f" for {len(group.names)} modules" if len(group.names) > 1 else ""
            why[i] = f"another unit gains {-negative:.3g} per cost, but costs {group.cost}{together} with {left} left"
            continue
        left -= group.cost
        ranks[i] += 1
        offer(i)
    rank_of = {name: ranks[i] for i, group in enumerate(groups) for name in group.names}
    return rank_of, {name: why[i] for i, group in enumerate(groups) for name in group.names}, left


def natural(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
