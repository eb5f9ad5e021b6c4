"""Sizes k of SpecLoRA's masks under a budget of Σ k. Numbers only: no models, no files.

S(k) of a module is neither concave nor monotone. The budget is spent along its upper concave envelope: from corner to
corner of the envelope, always the step with the largest gain per parameter.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorakit._checks import check_seed
from lorakit._figures import new_figure
from lorakit._format import count, extent
from lorakit._report import Report, Table
from lorakit.allocation.rules import natural
from lorakit.errors import AllocationError
from lorakit.naming.patterns import compact_pattern
from lorakit.naming.roles import group_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 12  # entries of a pattern in a next step


@dataclass(frozen=True)
class AllocatedMask:
    """One module's k, S(k), the largest k that its weight allows, and why k is not larger."""

    module_name: str
    role: str | None
    sensitivity: float
    limit: int
    k: int
    why: str

    @property
    def group(self) -> str:
        """The role, or what the module's name says where no role was given."""
        return self.role or group_of(self.module_name)


@dataclass(frozen=True, repr=False)
class MaskAllocation(Report):
    """Sizes k of masks whose sum, `cost`, does not exceed the budget."""

    budget: int
    cost: int
    modules: tuple[AllocatedMask, ...]

    @property
    def ks(self) -> dict[str, int]:
        """Each module's k."""
        return {row.module_name: row.k for row in self.modules}

    @property
    def headline(self) -> str:
        ks = list(self.ks.values())
        return f"{len(ks)} modules, k {_extent(ks)}, {count(self.cost)} of {count(self.budget)} spent"

    @property
    def details(self) -> tuple[str, ...]:
        """The ks of each role."""
        groups: dict[str, list[int]] = {}
        for row in self.modules:
            groups.setdefault(row.group, []).append(row.k)
        return tuple(f"{group}: k {_extent(ks)} in {len(ks)} modules" for group, ks in groups.items())

    @property
    def next_steps(self) -> tuple[str, ...]:
        """The config with these ks; a long pattern is taken from a variable named `allocation`."""
        ks = self.ks
        k = max(sorted(set(ks.values())), key=list(ks.values()).count)
        pattern = compact_pattern(ks, {name for name, value in ks.items() if value == k})
        targets = sorted({name.rpartition(".")[2] for name in ks})
        shown = repr(pattern) if len(pattern) <= _SHOWN else "allocation.ks"
        return (f"lorakit.SpecLoRAConfig(k={k}, target_modules={targets}, k_pattern={shown})",)

    def shuffled(self, *, seed: int) -> dict[str, int]:
        """The same ks on random modules: the control of a study, at equal parameters. See `shuffled`."""
        return shuffled(self.ks, limits={row.module_name: row.limit for row in self.modules}, seed=seed)

    def tables(self) -> list[Table]:
        columns: list[tuple[str, Callable[[AllocatedMask], str]]] = [
            ("module", lambda row: row.module_name),
            ("role", lambda row: row.role or "-"),
            ("S(k)", lambda row: f"{row.sensitivity:.3g}"),
            ("k", lambda row: str(row.k)),
            ("why not more", lambda row: row.why),
        ]
        return [Table.of("", columns, self.modules, long=True)]

    def explain(self) -> str:
        """The roles, then every module's S(k) and k and why it is not larger, as text."""
        spent = f"{self.cost} of {self.budget} spent"
        return "\n\n".join(["\n".join(self.details), *(table.text() for table in self.tables()), spent])

    def plot(self) -> Figure:
        """The ks in the order of the modules, one colour for each role."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        places = range(len(self.modules))
        for group in dict.fromkeys(row.group for row in self.modules):
            chosen = [i for i in places if self.modules[i].group == group]
            axes.plot(chosen, [self.modules[i].k for i in chosen], "o", ms=3, label=group)
        axes.set(xlabel="module", ylabel="k", title="Sizes of masks")
        axes.legend(fontsize=8)
        return figure


def allocate_masks(
    curves: Mapping[str, Mapping[int, float]],
    budget: int,
    *,
    roles: Mapping[str, str | None] | None = None,
    limits: Mapping[str, int] | None = None,
) -> MaskAllocation:
    """A k for every module, from its ladder, with Σ k within `budget`.

    Every module starts at its smallest k. Then the step with the largest gain of S per parameter is bought, along the
    upper concave envelopes. Where a step does not fit into the rest of the budget, the largest k below its end that
    fits and gains something is taken instead, and the module is done. Ties go to the name that comes first.

    Args:
        curves: for each module, S(k) for each k of its ladder; finite, not negative.
        budget: the largest Σ k.
        roles: the modules' roles, for the report.
        limits: the largest k that each module's weight allows; by default the largest of its ladder.

    Raises: AllocationError (a ValueError) for unusable curves, and for a budget below the sum of the smallest ks.

    Example:
        >>> curves = {"a": {1: 0.0, 4: 8.0, 8: 9.0}, "b": {1: 0.0, 4: 1.0, 8: 6.0}}
        >>> allocate_masks(curves, 12).ks
        {'a': 4, 'b': 8}
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise AllocationError(f"`budget` must be an integer, the largest sum of ks; got {budget!r}.")
    for name, curve in curves.items():
        _check_curve(name, curve)
    ks = {name: min(curve) for name, curve in curves.items()}
    left = budget - sum(ks.values())
    if left < 0:
        raise AllocationError(
            f"`budget` must cover the smallest k of all {len(ks)} modules (at least {budget - left}); got {budget}. "
            f"Raise it, or probe a ladder with a smaller k."
        )
    steps = {name: list(pairwise(envelope(curve))) for name, curve in curves.items()}
    order = sorted(curves, key=natural)
    why = {}
    heap: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        name = order[i]
        if steps[name]:
            (k, s), (end, reached) = steps[name][0]
            heapq.heappush(heap, (-(reached - s) / (end - k), i))
        else:
            most = ks[name] == max(curves[name])
            why[name] = "the largest k of the ladder" if most else "a larger k gains nothing"

    for i in range(len(order)):
        offer(i)
    while heap:
        _, i = heapq.heappop(heap)
        name = order[i]
        (k, s), (end, _) = steps[name].pop(0)
        if end - k <= left:
            ks[name], left = end, left - (end - k)
            offer(i)
            continue
        why[name] = f"the next step, to k = {end}, costs {end - k} with {left} left"
        fitting = [other for other, value in curves[name].items() if k < other <= k + left and value > s]
        if fitting:
            best = max(fitting, key=lambda other: (curves[name][other], -other))
            ks[name], left = best, left - (best - k)
    rows = []
    for name, curve in curves.items():
        limit = max(curve) if limits is None else limits[name]
        rows.append(AllocatedMask(name, (roles or {}).get(name), curve[ks[name]], limit, ks[name], why[name]))
    return MaskAllocation(budget, budget - left, tuple(rows))


def envelope(curve: Mapping[int, float]) -> list[tuple[int, float]]:
    """The corners of the upper concave envelope of a curve, from its smallest k to its peak."""
    corners: list[tuple[int, float]] = []
    for k, s in sorted(curve.items()):
        if corners and s <= corners[-1][1]:
            continue  # beyond a peak so far, only what rises above it counts
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], (k, s)):
            corners.pop()
        corners.append((k, s))
    return corners


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _check_curve(name: str, curve: Mapping[Any, Any]) -> None:
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in curve)
    if not curve or not whole or not all(math.isfinite(s) and s >= 0 for s in curve.values()):
        raise AllocationError(
            f"`curves` must have S(k), finite and not negative, for at least one positive k of each module; got "
            f"{dict(curve)!r} for {name!r}."
        )


def shuffled(
    values: Mapping[str, int],
    *,
    limits: Mapping[str, int] | None = None,
    costs: Mapping[str, int] | None = None,
    seed: int,
) -> dict[str, int]:
    """The same values on random modules: the control that says whether it matters which module has which value.

    Args:
        values: ranks or ks by module.
        limits: the largest value that each module can have. Every permutation within them is equally likely.
        costs: parameters for each unit of a value, for ranks. Values then move only between modules of equal cost, so
            that the sum of parameters stays the same.
        seed: the permutation's.

    Raises: AllocationError (a ValueError) if `values`, `limits` and `costs` differ in their modules, or a value exceeds
    its module's limit.

    Example:
        >>> sorted(shuffled({"a": 1, "b": 2, "c": 3}, seed=0).values())
        [1, 2, 3]
    """
    generator = random.Random(check_seed("seed", seed))
    for argument, mapping in (("limits", limits), ("costs", costs)):
        if mapping is not None and set(mapping) != set(values):
            differing = sorted(set(mapping) ^ set(values))
            raise AllocationError(f"`values` and `{argument}` must have the same modules; they differ in {differing}.")
    above = [name for name, value in values.items() if limits is not None and value > limits[name]]
    if above:
        raise AllocationError(f"`values` must not exceed `limits`; they do for {above}.")
    groups: dict[int | None, list[str]] = {}
    for name in sorted(values, key=natural):
        groups.setdefault(None if costs is None else costs[name], []).append(name)
    moved = {}
    for names in groups.values():
        # The largest value chooses first: whatever it takes, enough modules are left for each smaller one.
        for value in sorted((values[name] for name in names), reverse=True):
            free = [name for name in names if name not in moved and (limits is None or limits[name] >= value)]
            moved[generator.choice(free)] = value
    return {name: moved[name] for name in values}


def _extent(ks: Sequence[int]) -> str:
    return extent((min(ks), max(ks))) if ks else "none"
