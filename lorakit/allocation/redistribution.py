"""Ranks from measured marginal gains, at the parameters of uniform ranks. Numbers only."""

from __future__ import annotations

import random
from collections.abc import Mapping

from lorakit._checks import check_integer, check_number
from lorakit.allocation.budget import read_budget
from lorakit.allocation.masks import shuffled
from lorakit.allocation.rules import allocate
from lorakit.errors import AllocationError

EQUAL = 0.01  # budgets that are compared differ by at most this share


def redistribute(
    gains: Mapping[str, float], groups: Mapping[str, str], costs: Mapping[str, int], *, r: int, delta: int, budget: int
) -> dict[str, int]:
    """Ranks of all modules between r and r + delta, greedily by gain per parameter, for `budget` parameters.

    `gains` are the groups' g(r → r + delta) in any unit; a negative one counts as 0. Between the two measured ranks a
    group's gain is taken to fall off as 1/r − 1/(r + 1), and each module has its share of it by cost. What the greedy
    rule leaves over is spent by `matched`.

    Args:
        groups: each module's group. costs: parameters of one unit of rank in each module.

    Raises: AllocationError (a ValueError) if `groups` and `costs` differ in their modules, a group has no gain, or the
        budget does not cover rank r.

    Example:
        >>> redistribute({"q": 0.0, "v": 1.0}, {"a": "q", "b": "v"}, {"a": 8, "b": 8}, r=2, delta=4, budget=64)
        {'a': 2, 'b': 6}
    """
    check_integer("r", r)
    check_integer("delta", delta)
    if set(groups) != set(costs) or not set(groups.values()) <= set(gains):
        raise AllocationError("`groups` must have the modules of `costs`, and `gains` every group of theirs.")
    whole: dict[str, int] = {}
    for name, cost in costs.items():
        whole[groups[name]] = whole.get(groups[name], 0) + cost
    # Only ratios of gains count: the largest is 1, so that their unit changes nothing, down to the smallest floats.
    largest = max(gains[group] for group in whole)
    shares = {group: max(0.0, gains[group]) / largest if largest > 0 else 0.0 for group in whole}
    scale = 1 / r - 1 / (r + delta)
    scores = {n: shares[groups[n]] / scale * cost / whole[groups[n]] for n, cost in costs.items()}
    bound = dict.fromkeys(costs, r + delta)
    ones = dict.fromkeys(costs, 1)
    found = allocate(scores, costs, budget, rule="fisher", min_rank=r, max_rank=bound, d_out=ones)
    return matched(found.ranks, costs, budget, largest=r + delta)


def matched(ranks: Mapping[str, int], costs: Mapping[str, int], params: int, *, largest: int) -> dict[str, int]:
    """The ranks, changed by as few single units as it takes, so that Σ rank · cost is within 1 % of `params`.

    Units go where ranks are smallest, and are taken where they are largest, in turns over the modules. Ranks stay
    within 1 and `largest`. Raises: AllocationError (a ValueError) if no such change is found.
    """
    found = dict(ranks)
    spent = sum(rank * costs[name] for name, rank in found.items())
    for _ in range(sum(largest for _ in found)):
        apart = params - spent
        step = 1 if apart > 0 else -1
        free = [n for n in found if 1 <= found[n] + step <= largest and abs(apart - step * costs[n]) < abs(apart)]
        if not free:
            break
        name = min(free, key=lambda n: (step * found[n], abs(apart - step * costs[n])))
        found[name] += step
        spent += step * costs[name]
    if abs(spent - params) > EQUAL * params:
        raise AllocationError(
            f"Ranks of {params} parameters cannot be matched within 1 %: the nearest have {spent}. Use a larger rank."
        )
    return found


def shuffled_at_equal_cost(
    ranks: Mapping[str, int], costs: Mapping[str, int], *, largest: int, seed: int, params: int | None = None
) -> dict[str, int]:
    """The same ranks on random modules, within 1 % of `params` (None: of theirs): the control of an allocation.

    Ranks move between all modules, also of unequal cost: a permutation within each cost would keep what an allocation
    gives to query, value and MLP modules of different shapes, which is what the control is there to undo. Single units
    are then changed by `matched`; where all costs are equal, none are.
    Raises: AllocationError (a ValueError) if all ranks are equal, so that there is nothing to shuffle.
    """
    if len(set(ranks.values())) < 2:
        raise AllocationError("`ranks` must have different ranks to be shuffled; all are equal.")
    if params is None:
        params = sum(rank * costs[name] for name, rank in ranks.items())
    generator = random.Random(seed)
    for _ in range(1000):
        moved = shuffled(ranks, seed=generator.randrange(2**31))
        try:
            moved = matched(moved, costs, params, largest=largest)
        except AllocationError:
            continue
        if moved != dict(ranks):
            return moved
    raise AllocationError("`ranks` have no permutation of equal parameters within 1 %. Use a larger rank.")


def allowed_parameters(budget: int | float | str, uniform: int, bytes_each: int) -> int:
    """A budget (`2M`, `4MB`, or a fraction in (0, 1] of `uniform` parameters) as parameters of `bytes_each` bytes."""
    if isinstance(budget, str):
        try:
            number = float(budget)
        except ValueError:
            number = 2.0
        budget = int(budget) if budget.isdigit() else number if 0 < number <= 1 and "." in budget else budget
    if isinstance(budget, float):
        check_number("budget", budget, above=0, most=1)
        return int(budget * uniform + 1e-6)
    amount, unit = read_budget(budget)
    return amount // bytes_each if unit == "bytes" else amount
