"""Which ranks `truncate` keeps: one for all modules unless asked otherwise, because files have one rank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit._checks import check_integer, check_number
from lorakit.adapters import AdapterModule
from lorakit.adapters.experts import group_spectrum
from lorakit.allocation import Unit, allocate, read_budget
from lorakit.errors import AllocationError, Finding
from lorakit.naming.matching import PatternMatcher
from lorakit.naming.patterns import unmatched_keys, values_of
from lorakit.serving._needs import Needs
from lorakit.serving._written import COMPACT_READERS
from lorakit.spectral import energy_rank

Ranks = int | Mapping[str, int]
EnergyOf = Literal["module", "total"]
Spectra = Mapping[str, Tensor]

_LITTLE = 0.1  # share of the parameters


@dataclass(frozen=True)
class RankChoice:
    """How ranks are chosen: by exactly one of `ranks`, `energy`, `budget` and `max_rank`."""

    ranks: Ranks | None = None
    energy: float | None = None
    budget: int | str | None = None
    max_rank: int | None = None
    energy_of: EnergyOf = "module"
    per_module: bool = False
    pad: bool = True
    needs: Needs = field(default_factory=Needs)

    def __post_init__(self) -> None:
        names = ("ranks", "energy", "budget", "max_rank")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise TypeError(
                f"Exactly one of {', '.join(f'`{n}`' for n in names)} must be given; got {given or 'none'}."
            )
        if self.energy_of not in get_args(EnergyOf):
            raise ValueError(f"`energy_of` must be one of {', '.join(get_args(EnergyOf))}; got {self.energy_of!r}.")
        if self.energy_of == "total" and (self.energy is None or self.per_module):
            raise TypeError("`energy_of='total'` is for `energy` with one rank for all modules.")
        if self.per_module and self.ranks is not None:
            raise TypeError("`per_module` does not go with `ranks`, which says each module's rank; use `pad=False`.")
        if self.energy is not None:
            check_number("energy", self.energy, above=0, most=1)
        if self.max_rank is not None:
            check_integer("max_rank", self.max_rank)

    @property
    def criterion(self) -> str:
        """Which of the four was given."""
        return next(name for name in ("ranks", "energy", "budget", "max_rank") if getattr(self, name) is not None)

    @property
    def padded(self) -> bool:
        """Whether all modules are written at one rank."""
        return self.pad and not self.per_module

    def describe(self) -> str:
        """The criterion as it was given, for the model card."""
        parts = [f"{self.criterion}={getattr(self, self.criterion)!r}"]
        parts += ["energy_of='total'"] if self.energy_of == "total" else []
        return ", ".join(parts + (["per_module=True"] if self.per_module else []))

    def kept_ranks(self, modules: Sequence[AdapterModule], spectra: Spectra) -> dict[str, int]:
        """The rank that each module keeps, without padding.

        Raises: ValueError for ranks that a module does not have; AllocationError for a budget that is too small.
        """
        if self.ranks is not None:
            return _given_ranks(modules, self.ranks)
        if self.per_module and self.energy is not None:
            return {module.name: least_rank(spectra[module.name], self.energy) for module in modules}
        if self.per_module and self.budget is not None:
            amount, unit = read_budget(self.budget)
            costs = {module.name: _cost(module, unit) for module in modules}
            return allocate(
                {name: group_spectrum(sigma).tolist() for name, sigma in spectra.items()}, costs, amount
            ).ranks
        rank = self._one_rank(modules, spectra)
        return {module.name: min(rank, module.rank) for module in modules}

    def _one_rank(self, modules: Sequence[AdapterModule], spectra: Spectra) -> int:
        if self.max_rank is not None:
            return self.max_rank
        if self.energy is None:
            return self._affordable(modules)
        if self.energy_of == "total":
            rank = least_total_rank(spectra, self.energy)
        else:
            rank = max(least_rank(sigma, self.energy) for sigma in spectra.values())
        return self.needs.rank_at_least(rank) if self.padded else rank

    def _affordable(self, modules: Sequence[AdapterModule]) -> int:
        assert self.budget is not None
        amount, unit = read_budget(self.budget)

        def cost(rank: int) -> int:
            return sum(_cost(m, unit) * (rank if self.padded else min(rank, m.rank)) for m in modules)

        largest = self.needs.rank_at_least(max(module.rank for module in modules))
        ranks = [rank for rank in range(1, largest + 1) if self.needs.takes(rank)]
        affordable = [rank for rank in ranks if cost(rank) <= amount]
        if not affordable:
            raise AllocationError(
                f"`budget` must cover rank {ranks[0]} in all {len(modules)} modules (at least {cost(ranks[0])} "
                f"{unit}); got {amount}. Raise it."
            )
        return affordable[-1]


def least_rank(singular_values: Tensor, energy: float) -> int:
    """The smallest rank, at least 1, that keeps a share of one module's energy, or of each of its experts'."""
    return max(1, int(energy_rank(singular_values, energy).max()))


def least_total_rank(spectra: Spectra, energy: float) -> int:
    """The smallest rank, the same for all modules, that keeps a share of the sum of their energies."""
    return least_rank(_energies(spectra).sqrt(), energy)


def _energies(spectra: Spectra) -> Tensor:
    """Σ over modules of σ_k², for k = 1, 2, …, relative to the largest σ."""
    peak = max(float(sigma.max()) for sigma in spectra.values()) or 1.0
    total = torch.zeros(max(sigma.shape[-1] for sigma in spectra.values()), dtype=torch.float64)
    for sigma in map(group_spectrum, spectra.values()):
        total[: len(sigma)] += (sigma.double() / peak).square()
    return total


def little_saved(
    choice: RankChoice, modules: Sequence[AdapterModule], spectra: Spectra, before: int, after: int
) -> list[Finding]:
    """A finding where less than a tenth of the parameters was saved, which says what would save more."""
    if after <= (1 - _LITTLE) * before:
        return []
    each = sum(_cost(module, "parameters") for module in modules)
    largest = max(module.rank for module in modules)
    options: list[tuple[str, int]] = []
    if choice.energy is not None and not choice.per_module:
        if choice.energy_of == "module":
            options.append(("`energy_of='total'`", each * least_total_rank(spectra, choice.energy)))
        own = sum(_cost(m, "parameters") * least_rank(spectra[m.name], choice.energy) for m in modules)
        options.append((f"`per_module=True` ({COMPACT_READERS})", own))
    for rank in (largest * 3 // 4, largest // 2, 1):
        if rank >= 1:
            energies = _energies(spectra)
            kept = float(energies[:rank].sum() / energies.sum()) if float(energies.sum()) > 0 else 1.0
            options.append((f"`max_rank={rank}`, which keeps {kept:.1%} of the energy,", each * rank))
    saving = [f"{text} saves {1 - size / before:.0%}" for text, size in options if size <= (1 - _LITTLE) * before][:3]
    change = f"Only {1 - after / before:.1%} of the factors' parameters were saved"
    if after > before:
        change = f"The factors have {after / before - 1:.1%} more parameters than before, with the padding to one rank"
    advice = f"; {'; '.join(saving)}" if saving else ""
    return [Finding("warning", "little_saved", None, f"{change}{advice}.")]


def _cost(module: AdapterModule, unit: Unit) -> int:
    """What one unit of rank costs, in parameters or in bytes as stored."""
    experts = module.experts or 1
    if unit == "parameters":
        return experts * (module.d_out + module.d_in)
    A_dtype, B_dtype = module.stored.A.dtype, module.stored.B.dtype
    assert A_dtype is not None
    assert B_dtype is not None
    return experts * (module.d_out * B_dtype.itemsize + module.d_in * A_dtype.itemsize)


def _given_ranks(modules: Sequence[AdapterModule], ranks: Ranks) -> dict[str, int]:
    if isinstance(ranks, Mapping):
        for key, value in ranks.items():
            check_integer(f"ranks[{key!r}]", value)
            try:
                PatternMatcher([key])
            except (re.error, TypeError) as error:
                raise ValueError(f"`ranks` has the key {key!r}, which is no regular expression: {error}.") from None
        stray = unmatched_keys(ranks, [module.name for module in modules])
        if stray:
            raise ValueError(f"`ranks` has {stray[0]!r}, which matches no module; the first is {modules[0].name!r}.")
        kept = values_of(ranks, {module.name: module.rank for module in modules})
    else:
        kept = dict.fromkeys((module.name for module in modules), check_integer("ranks", ranks))
    beyond = [module for module in modules if kept[module.name] > module.rank]
    if beyond:
        name, rank = beyond[0].name, beyond[0].rank
        raise ValueError(
            f"`ranks` must not exceed a module's own rank; {name} has {rank}, and {kept[name]} was asked for. "
            f"`max_rank` only bounds them."
        )
    return kept
