"""The merges of all modules of several adapters, one module in memory at a time."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from lorakit._signals import restoring
from lorakit.adapters import Adapter, AdapterModule
from lorakit.adapters.rewritable import check_finite
from lorakit.merging._combine import DENSE, Items, Merged, Method, combiner, least_rank, merged
from lorakit.merging._together import Present
from lorakit.serving._needs import Needs
from lorakit.spectral import LowRank


@dataclass(frozen=True)
class Recipe:
    """How to merge; see `merge`."""

    method: Method
    rank: int | None
    energy: float | None
    density: float | None
    seed: int
    pad: bool
    needs: Needs


@dataclass(frozen=True, eq=False)
class Merging:
    """The merges of all modules, computed when they are asked for, one module in memory at a time."""

    views: Sequence[Adapter]
    present: Present
    weights: Sequence[float]
    recipe: Recipe

    @functools.cached_property
    @torch.no_grad()
    def ranks(self) -> dict[str, int]:
        """The rank of every module's merge, without padding: one for all if it is chosen here and padding is on."""
        recipe = self.recipe
        full = {name: self._full_rank(list(modules.values())) for name, modules in self.present.items()}
        if recipe.rank is not None:
            return {name: min(recipe.rank, rank) for name, rank in full.items()}
        if recipe.energy is not None:
            combine = combiner(recipe.method, recipe.density)
            with _seeded(recipe):
                items = self._items("choosing the rank")
                least = {name: least_rank(each, combine, recipe.energy) for name, each in items}
            if not recipe.pad:
                return least
            rank = recipe.needs.rank_at_least(max(least.values()))
            return {name: min(rank, most) for name, most in full.items()}
        if recipe.method == "linear":
            return full
        own = {name: max(module.rank for module in modules.values()) for name, modules in self.present.items()}
        if recipe.pad:
            own = dict.fromkeys(own, recipe.needs.rank_at_least(max(own.values())))
        return {name: min(own[name], most) for name, most in full.items()}

    def _full_rank(self, modules: Sequence[AdapterModule]) -> int:
        """The rank of a module's merge that is not cut."""
        side = min(modules[0].d_out, modules[0].d_in)
        return side if self.recipe.method in DENSE else min(side, sum(module.rank for module in modules))

    @torch.no_grad()
    def updates(self) -> Iterator[tuple[str, LowRank, Merged]]:
        """Module by module the merge of its rank, with its numbers."""
        recipe = self.recipe
        combine = combiner(recipe.method, recipe.density)
        exact = recipe.method == "linear" and recipe.rank is None and recipe.energy is None
        with _seeded(recipe):
            for name, each in self._items("merging"):
                yield name, *merged(each, combine, None if exact else self.ranks[name])

    def _items(self, progress: str) -> Iterator[tuple[str, Items]]:
        """Module by module, the updates of the adapters that have it, with their weights."""
        bar = tqdm(self.present.items(), desc=progress, delay=1.0, unit="module", leave=False, disable=None)
        with contextlib.ExitStack() as stack:
            reads = [stack.enter_context(view.source.reader()) for view in self.views]
            for name, modules in bar:
                items = []
                for i, module in modules.items():
                    update = module.update(reads[i])
                    check_finite(self.views[i], module, update)
                    items.append((update, self.weights[i]))
                yield name, items


@restoring
def _seeded(recipe: Recipe) -> Iterator[None]:
    """The same random numbers for `dare` each time, and torch's global state as it was afterwards."""
    with torch.random.fork_rng(enabled=recipe.method == "dare"):
        if recipe.method == "dare":
            torch.manual_seed(recipe.seed)
        yield


def checked_weights(adapters: object, weights: Sequence[float] | None) -> list[float]:
    """The weights, 1/n each by default. Raises: TypeError, ValueError."""
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence):
        raise TypeError(f"`adapters` must be a list of adapters; got {type(adapters).__name__}.")
    if not adapters:
        raise ValueError("`adapters` must have at least one adapter; got none.")
    chosen = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(chosen) != len(adapters):
        raise ValueError(f"`weights` must have one weight for each of {len(adapters)} adapters; got {len(chosen)}.")
    if not all(math.isfinite(weight) for weight in chosen):
        raise ValueError(f"`weights` must be finite; got {chosen}.")
    return chosen
