"""Scores, costs and a budget → integer ranks. Pure: numbers in, numbers out, so that a config can use it too.

All rules buy units of rank one after the other, the unit of the largest gain per cost first. Where a unit does not fit
in what is left of the budget it is skipped and the next is tried. Rules differ in what a unit gains.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from lorakit.errors import AllocationError

Rule = Literal["fisher", "fisherlora", "spectral", "energy", "prior", "uniform"]
Per = Literal["module", "role"]
Unit = Literal["parameters", "bytes"]
RULES: tuple[Rule, ...] = get_args(Rule)

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?(b?)\s*", re.IGNORECASE)

# Which roles get their ranks first; None are the other roles. "Keep V, reduce Q", and its control.
_ORDERS: dict[str, tuple[str | None, ...]] = {
    "fisherlora": ("value", None, "query"),
    "spectral": ("query", None, "value"),
}


class ProbedModule(Protocol):
    """What an allocation needs to know of one probed module."""

    @property
    def module_name(self) -> str: ...
    @property
    def role(self) -> str | None: ...
    @property
    def d_out(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def fisher(self) -> float: ...


class ProbeReport(Protocol):
    """A probe's report, as far as an allocation needs it; `lorakit.fisher.FisherReport` is one."""

    @property
    def modules(self) -> Sequence[ProbedModule]: ...
    @property
    def target_modules(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class AllocatedRow:
    """One module's score (for the energy rule Σ σ²), its cost per unit of rank, its rank, and why not one more."""

    module_name: str
    role: str | None
    score: float
    cost: int
    rank: int
    why: str


@dataclass(frozen=True)
class Allocation:
    """Ranks whose cost Σ rank · cost does not exceed the budget; `rows` are in the order of `costs`."""

    rule: Rule
    per: Per
    budget: int
    cost: int
    rows: tuple[AllocatedRow, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Each module's rank."""
        return {row.module_name: row.rank for row in self.rows}

    def explain(self) -> str:
        """A table of every module's score, cost, rank, and why it has no more."""
        heading = ("module", "role", "score", "cost", "rank", "why not one more")
        lines = [heading] + [
            (row.module_name, row.role or "-", f"{row.score:.3g}", str(row.cost), str(row.rank), row.why)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heading) - 1)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
                + [cell.rjust(width) for cell, width in zip(line[2:5], widths[2:], strict=True)]
                + [line[5]]
            )
            for line in lines
        ]
        share = f" ({self.cost / self.budget:.1%})" if self.budget else ""
        text.append(f"rule {self.rule}, per {self.per}: {self.cost} of {self.budget}{share} spent")
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON takes."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class _Group:
    """Modules that share one rank: `gain(r)` is what rank r + 1 adds to rank r, 0 where there is nothing to add."""

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
    """Ranks for all modules, at least `min_rank` each, whose cost Σ rank · cost does not exceed `budget`.

    The result depends neither on the order of the modules nor on the scale of the scores: ties go to the name that
    comes first (layer 2 before layer 10). Units that gain nothing are not bought.

    Args:
        scores: for each module, what `rule` makes gains of (one finite number >= 0; for "energy" a sequence).
        costs: for each module, what one unit of rank costs, such as d_in + d_out parameters.
        budget: in the unit of `costs`.
        rule: what unit r + 1 of a module gains:

            * ``fisher``: F · d_out · (1/r − 1/(r + 1)), the score F being the mean Fisher information of an entry of
              lora_B; needs `d_out`. Falls with r, so that ranks grow as √(F · d_out / cost).
            * ``fisherlora``: keep V, reduce Q. One rank per role: value projections get as much of `max_rank` as the
              budget allows, then the other roles together, then query projections. Needs `roles` and `max_rank`.
            * ``spectral``: the control, queries first and values last.
            * ``energy``: the (r + 1)-th largest σ², the score being a trained update's singular values, in any order;
              a module has as many units as values.
            * ``prior``: ranks in proportion to score · √cost (as integers: the largest quotient of that by r + ½).
            * ``uniform``: one rank for all.
        max_rank: an upper bound, one for all or one for each module.
        per: "role" gives the modules of one role one rank, for the sum of their gains; needs `roles`.
        roles: each module's role, or None for one that has none.
        d_out: each module's output width.

    Raises: AllocationError (a ValueError) for a budget that does not cover `min_rank` everywhere, scores that are
    negative or not finite, and arguments that make no sense together.
    References: METHODS of the rules: "LoRA-Lens", section 4 (fisherlora, spectral); greedy gains and the prior are
    those of budgeted rank allocation by sensitivity, r ∝ s · √(d_in + d_out).
    """
    _check_options(rule, per, min_rank, roles, d_out, max_rank)
    by_name = {"costs": costs, "roles": roles, "d_out": d_out, "max_rank": max_rank}
    for argument, mapping in by_name.items():
        if isinstance(mapping, Mapping) and set(mapping) != set(scores):
            differing = sorted(set(scores) ^ set(mapping))
            raise AllocationError(f"`scores` and `{argument}` must have the same modules; they differ in {differing}.")
    for argument, widths in (("costs", costs), ("d_out", d_out or {})):
        for name, value in widths.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise AllocationError(f"`{argument}` must be positive integers; got {value!r} for {name!r}.")
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
        rows.append(AllocatedRow(name, role, score, cost, rank_of[name], why_of[name]))
    return Allocation(rule, per, budget, budget - left, tuple(rows))


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
        raise AllocationError("The rule 'fisher' needs `d_out`, each module's output width.")
    if rule == "fisher" and min_rank < 1:
        raise AllocationError("The rule 'fisher' says nothing of rank 0; `min_rank` must be at least 1.")
    if roles is None and (per == "role" or rule in _ORDERS):
        raise AllocationError(f"{f'The rule {rule!r}' if rule in _ORDERS else 'Ranks per role'} needs `roles`.")
    if rule in _ORDERS:
        if max_rank is None:
            raise AllocationError(f"The rule {rule!r} needs `max_rank`, the rank of what is kept.")
        if not {"query", "value"} <= set(roles.values()):
            raise AllocationError(
                f"The rule {rule!r} needs query and value projections among the modules; their roles are "
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
    """For each module what unit r + 1 gains, relative to the largest score (so that nothing under- or overflows)."""
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
    """Modules that get one rank together; a module without a role stands for itself."""
    order = _ORDERS.get(rule)
    members: dict[tuple[int, str], list[str]] = {}
    for name in sorted(costs, key=_natural):
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
    """Every module's rank, why it has no more, and what is left of the budget."""
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
        if group.cost > left:  # nor will the group's later units fit
            together = f" for {len(group.names)} modules" if len(group.names) > 1 else ""
            why[i] = f"another unit gains {-negative:.3g} per cost, but costs {group.cost}{together} with {left} left"
            continue
        left -= group.cost
        ranks[i] += 1
        offer(i)
    rank_of = {name: ranks[i] for i, group in enumerate(groups) for name in group.names}
    return rank_of, {name: why[i] for i, group in enumerate(groups) for name in group.names}, left


def _natural(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


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
