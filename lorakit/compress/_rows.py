"""The rows of compress's report, and the shares of energy that are kept, counted while modules are written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorakit.adapters import Adapter, AdapterModule
from lorakit.compress._ranks import Spectra
from lorakit.compress._report import CompressedModule
from lorakit.spectral import LowRank


class Rows:
    """What is reported of each module, and of all together, from what is written."""

    def __init__(self, spectra: Spectra, weighted: Spectra) -> None:
        self._spectra, self._weighted = spectra, weighted
        self._total, self._seen_total = _Shares(spectra), _Shares(weighted)
        self._rows: dict[str, tuple[int, float, float | None]] = {}

    def add(self, module: AdapterModule, update: LowRank) -> None:
        """Count a module that is written as `update`."""
        name, rank = module.name, update.rank
        sigma = self._spectra[name]
        kept = sigma[..., :rank]
        if self._weighted and rank < sigma.shape[-1]:  # not the leading components
            kept = update.singular_values().double().cpu()
        seen = self._seen_total.add(name, self._weighted[name][:rank]) if self._weighted else None
        self._rows[name] = rank, self._total.add(name, kept), seen

    @property
    def energy_kept(self) -> float:
        return self._total.overall

    @property
    def weighted_energy_kept(self) -> float | None:
        return self._seen_total.overall if self._weighted else None

    def of(self, view: Adapter, padded_to: int | None, errors: Mapping[str, float]) -> tuple[CompressedModule, ...]:
        rows = []
        for module in view.modules:
            rank, energy, weighted_energy = self._rows[module.name]
            rows.append(
                CompressedModule(
                    module_name=module.name,
                    role=module.role,
                    layer=module.layer,
                    rank=module.stored.rank,
                    kept_rank=rank,
                    whole_update=module.whole_of is not None,
                    experts=module.experts,
                    parameters=(padded_to or rank) * (module.experts or 1) * (module.d_out + module.d_in),
                    energy_kept=energy,
                    weighted_energy_kept=weighted_energy,
                    low_rank_part_only=module.magnitude is not None,
                    error=errors.get(module.name),
                )
            )
        return tuple(rows)


class _Shares:
    """Shares of energy kept, module by module and over all; 1 where there is none to keep."""

    def __init__(self, spectra: Mapping[str, Tensor]) -> None:
        self._spectra = spectra
        self._peak = max((float(sigma.max()) for sigma in spectra.values() if len(sigma)), default=0.0) or 1.0
        self._kept = self._total = 0.0

    def add(self, name: str, kept: Tensor) -> float:
        of_all = float((self._spectra[name] / self._peak).square().sum())
        of_kept = min(of_all, float((kept / self._peak).square().sum()))
        self._kept, self._total = self._kept + of_kept, self._total + of_all
        return of_kept / of_all if of_all > 0 else 1.0

    @property
    def overall(self) -> float:
        return self._kept / self._total if self._total > 0 else 1.0
