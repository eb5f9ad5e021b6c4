"""From spectra to suggested ranks, each with what it costs and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.allocation.budget import read_budget
from lorakit.allocation.rules import allocate
from lorakit.lens.static.spectra import AuditedModule
from lorakit.serving._needs import SERVED_RANKS


@dataclass(frozen=True)
class RankSuggestion:
    """The ranks that one policy suggests. Every rank is at least 1 and at most the module's own.

    `rank`: the one rank of a global policy, otherwise None. `energy_kept`: the share of Σ ‖ΔW‖_F² that the best
    approximations of these ranks keep. `modules_covered`: how many modules keep the requested energy. `served_rank`:
    the largest rank, rounded up to a size that servers offer. `served_parameters`: the parameters if every module's
    rank is rounded up that way.
    """

    policy: str
    rank: int | None
    ranks: dict[str, int]
    parameters: int
    energy_kept: float
    modules_covered: int
    served_rank: int
    served_parameters: int

    @property
    def label(self) -> str:
        """The policy's name in tables and legends."""
        return self.policy.replace("_", " ")


def covering(values: Sequence[int], share: float) -> int:
    """The smallest of `values` that is at least as large as `share` of them."""
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def served(rank: int) -> int:
    """`rank` rounded up to a size that servers offer; unchanged above the largest."""
    return next((size for size in SERVED_RANKS if size >= rank), rank)


def suggest(modules: Sequence[AuditedModule], threshold: str, budget: int | str | None) -> list[RankSuggestion]:
    """One suggestion for each policy, from modules with finite updates; none if all updates are zero.

    `threshold` is the key of the requested energy in `AuditedModule.energy_rank`.
    Raises: ValueError for a budget that does not cover rank 1 in every module.
    """
    if not any(module.spectral_norm for module in modules):
        return []
    needed = {m.module_name: max(1, (m.energy_rank or {})[threshold]) for m in modules}
    suggestions = []
    for policy, share in (("global_median", 0.5), ("global_p90", 0.9)):
        k = covering(list(needed.values()), share)
        suggestions.append(_suggestion(policy, modules, needed, {m.module_name: min(k, m.rank) for m in modules}, k))
    knees = {m.module_name: max(1, m.knee or 0) for m in modules}
    effective = {m.module_name: max(1, math.ceil((m.effective_rank or 0.0) - 1e-6)) for m in modules}
    for policy, ranks in (("per_module", needed), ("knee", knees), ("entropy", effective)):
        suggestions.append(_suggestion(policy, modules, needed, ranks))
    if budget is not None:
        suggestions.append(_suggestion("budget", modules, needed, within(modules, budget)))
    return suggestions


def within(modules: Sequence[AuditedModule], budget: int | str) -> dict[str, int]:
    """Ranks under a budget of parameters or bytes, by greedy energy per parameter."""
    amount, unit = read_budget(budget)
    size = {m.module_name: m.bytes_per_entry if unit == "bytes" else 1 for m in modules}
    costs = {m.module_name: size[m.module_name] * m.parameters_of_a_rank for m in modules}
    return allocate({m.module_name: m.singular_values for m in modules}, costs, amount).ranks


def _suggestion(
    policy: str,
    modules: Sequence[AuditedModule],
    needed: Mapping[str, int],
    ranks: dict[str, int],
    rank: int | None = None,
) -> RankSuggestion:
    peak = max(m.spectral_norm or 0.0 for m in modules)
    kept = total = 0.0
    for module in modules:
        energies = [(value / peak) ** 2 for value in module.singular_values]
        kept += sum(energies[: ranks[module.module_name]])
        total += sum(energies)
    largest = max(ranks.values()) if rank is None else rank
    rounded = {name: served(k if rank is None else rank) for name, k in ranks.items()}
    return RankSuggestion(
        policy=policy,
        rank=rank,
        ranks=ranks,
        parameters=sum(ranks[m.module_name] * m.parameters_of_a_rank for m in modules),
        energy_kept=kept / total,
        modules_covered=sum(ranks[name] >= k for name, k in needed.items()),
        served_rank=served(largest),
        served_parameters=sum(rounded[m.module_name] * m.parameters_of_a_rank for m in modules),
    )
