"""What is left of two adapters in their merge, from the arithmetic of `lorakit.merging.merge` itself.

linear and svd never form ΔW; ties and dare form each module's, as the merge does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit._checks import check_integer, check_number
from lorakit.adapters import Adapter
from lorakit.adapters.rewritable import check_rewritable
from lorakit.lens.static.forecast_report import MergeForecast, MethodForecast
from lorakit.merging._combine import DENSE, METHODS, Method
from lorakit.merging._together import modules_of
from lorakit.merging._updates import Merging, Recipe, checked_weights
from lorakit.serving._needs import Needs
from lorakit.spectral import LowRank, energy_rank


@dataclass(frozen=True)
class ForecastOptions:
    """Which merges are forecast, checked. `weights` None is 1/2 each.

    Raises: TypeError, ValueError.
    """

    weights: Sequence[float] | None
    methods: Sequence[Method]
    rank: int | None
    density: float
    seed: int
    chosen: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        one, other = checked_weights(["a", "b"], self.weights)
        object.__setattr__(self, "chosen", (one, other))
        if isinstance(self.methods, str):
            raise TypeError(f"`methods` must be a list of methods; got {self.methods!r}.")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"`methods` must be some of {', '.join(METHODS)}; got {got}.")
        if self.rank is not None:
            check_integer("rank", self.rank)
        check_number("density", self.density, above=0, most=1)

    def recipe(self, method: Method) -> Recipe:
        """How `merge` would merge by a method; `rank` is for methods that cut."""
        rank = None if method == "linear" else self.rank
        density = self.density if method in DENSE else None
        return Recipe(method, rank, None, density, self.seed, True, Needs())


@torch.no_grad()
def forecast(views: tuple[Adapter, Adapter], options: ForecastOptions, energy: float) -> MergeForecast:
    """What is left of both adapters by each method, at the directions that keep a share `energy` of each update.

    Raises: UnsupportedModelError, ValueError and AdapterFileError for adapters that cannot be merged.
    """
    for view in views:
        check_rewritable(view)
    present = modules_of(views)
    found = []
    for method in dict.fromkeys(options.methods):
        left = _Left(), _Left()
        norm, rank = 0.0, 0
        recipe = options.recipe(method)
        with views[0].source.reader() as read_one, views[1].source.reader() as read_other:
            for name, merge, numbers in Merging(views, present, options.chosen, recipe).updates():
                bases = _Bases(merge)
                norm = math.hypot(norm, bases.norm)
                rank = max(rank, numbers.kept_rank)
                for i, module in present[name].items():
                    left[i].add(module.update((read_one, read_other)[i]), merge, bases, energy)
        found.append(_method(method, recipe, left, norm, rank))
    return MergeForecast(options.chosen, tuple(found))


class _Bases:
    """Orthonormal bases of a merge's column and row spaces, with zero columns beyond its numerical rank."""

    def __init__(self, merge: LowRank) -> None:
        U, S, Vh = merge.svd()
        inside = _leading(S, merge.numerical_rank())
        self.norm = float(torch.linalg.vector_norm(S.double()))
        self.sides = U.double() * inside[..., None, :], Vh.mT.double() * inside[..., None, :]


class _Left:
    """Sums over the modules of one adapter."""

    def __init__(self) -> None:
        self.inner = self.square = 0.0
        self.directions: list[float] = []

    def add(self, update: LowRank, merge: LowRank, bases: _Bases, energy: float) -> None:
        """Add one module's."""
        U, S, Vh = update.svd()
        self.square += float(S.double().square().sum())
        self.inner += float(merge.inner(update).double().sum())
        ranks = update.numerical_rank()
        if energy < 1:
            ranks = torch.minimum(ranks, energy_rank(S, energy))
        inside = _leading(S, ranks)
        if inside.any():
            kept = sum(
                (basis.mT @ own.double()).square().sum(-2) for basis, own in zip(bases.sides, (U, Vh.mT), strict=True)
            )
            assert isinstance(kept, Tensor)
            self.directions.append(float((kept * inside).sum() / (2 * inside.sum())))


def _leading(S: Tensor, ranks: Tensor) -> Tensor:
    """1.0 for the leading `ranks` of each spectrum, else 0.0."""
    return (torch.arange(S.shape[-1], device=S.device) < ranks[..., None]).double()


def _method(method: Method, recipe: Recipe, left: tuple[_Left, _Left], norm: float, rank: int) -> MethodForecast:
    numbers: dict[str, Any] = {}
    along = []
    for label, one in zip("ab", left, strict=True):
        strength = one.inner / one.square if one.square > 0 else None
        numbers[f"strength_{label}"] = strength
        numbers[f"energy_{label}"] = None if strength is None else strength**2
        numbers[f"directions_{label}"] = math.fsum(one.directions) / len(one.directions) if one.directions else None
        along.append(abs(strength or 0.0) * math.sqrt(one.square))
    total = sum(along)
    return MethodForecast(
        method=method,
        density=recipe.density,
        seed=recipe.seed if method == "dare" else None,
        rank=rank,
        norm=norm,
        dominance_a=along[0] / total if total > 0 else None,
        **numbers,
    )
