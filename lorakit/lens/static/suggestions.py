"""From spectra to suggested ranks, each with what it costs and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.adapters.lora_config import spelled_out
from lorakit.adapters.write_lora import integral
from lorakit.allocation.budget import read_budget
from lorakit.allocation.rules import allocate
from lorakit.lens._curvature import Curvature, LossGap, loss_gap
from lorakit.lens.static.spectra import AuditedModule
from lorakit.naming.patterns import compact_pattern
from lorakit.serving._needs import SERVED_RANKS

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class RankSuggestion:
    """The ranks that one policy suggests. Every rank is at least 1 and at most the module's own.

    `rank`: the one rank of a global policy, otherwise None. `energy_kept`: the share of Σ ‖ΔW‖_F² that the best
    approximations of these ranks keep. `modules_covered`: how many modules keep the requested energy. `served_rank`:
    the largest rank, rounded up to a size that servers offer. `served_parameters`: the parameters if every module's
    rank is rounded up that way. `scalings`: each module's scaling in the audited adapter. `loss_gaps`: what the cut to
    these ranks may cost in loss, where a curvature was given: of all modules together, or of each module that has one.
    """

    policy: str
    rank: int | None
    ranks: dict[str, int]
    parameters: int
    energy_kept: float
    modules_covered: int
    served_rank: int
    served_parameters: int
    scalings: dict[str, float]
    loss_gaps: tuple[LossGap, ...] = ()

    @property
    def label(self) -> str:
        """The policy's name in tables and legends."""
        return self.policy.replace("_", " ")

    def to_config(self, **fields: Any) -> LoraConfig:
        """A LoraConfig for `get_peft_model` that trains the audited modules anew, at these ranks.

        Every module has the scaling alpha / r that it had in the audited adapter, whatever its rank, and is named in
        full; no other is adapted. `fields` are other fields of LoraConfig, such as `lora_dropout` and `task_type`.

        Raises: ValueError for a field that the ranks decide.

        Example:
            >>> suggestion = lorakit.lens.audit("adapter/", suggest_ranks=True).suggestions[0]  # doctest: +SKIP
            >>> model = get_peft_model(base, suggestion.to_config(task_type="CAUSAL_LM"))  # doctest: +SKIP
        """
        from peft import LoraConfig

        r = max(self.ranks.values())
        alphas = {name: integral(self.scalings[name] * rank) for name, rank in self.ranks.items()}
        alpha = next(alphas[name] for name, rank in self.ranks.items() if rank == r)
        decided = {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": compact_pattern(self.ranks, {name for name, rank in self.ranks.items() if rank == r}),
            "alpha_pattern": compact_pattern(alphas, {name for name, value in alphas.items() if value == alpha}),
            "use_rslora": False,
            **spelled_out(self.ranks),
        }
        both = sorted(decided.keys() & fields.keys())
        if both:
            raise ValueError(f"`fields` must not have {', '.join(both)}: the suggested ranks decide them.")
        return LoraConfig(**decided, **fields)


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
    above = {m.module_name: max(1, m.hard_threshold_rank or 0) for m in modules}
    for policy, ranks in (
        ("per_module", needed),
        ("knee", knees),
        ("entropy", effective),
        ("hard_threshold", above),
    ):
        suggestions.append(_suggestion(policy, modules, needed, ranks))
    if budget is not None:
        suggestions.append(_suggestion("budget", modules, needed, within(modules, budget)))
    return suggestions


def suggestion_of(
    policy: str, modules: Sequence[AuditedModule], threshold: str, ranks: Mapping[str, int]
) -> RankSuggestion:
    """The suggestion of given ranks, of at most the modules' own; `policy` names it, `threshold` is as in `suggest`."""
    needed = {m.module_name: max(1, (m.energy_rank or {})[threshold]) for m in modules}
    own = {m.module_name: min(ranks[m.module_name], m.rank) for m in modules}
    only = set(own.values())
    return _suggestion(policy, modules, needed, own, only.pop() if len(only) == 1 else None)


def with_loss_gaps(
    suggestion: RankSuggestion, modules: Sequence[AuditedModule], curvature: Sequence[Curvature]
) -> RankSuggestion:
    """The suggestion with what its ranks may cost in loss. Updates that are known in part only have no bound."""
    gaps = []
    for one in curvature:
        cut = [module for module in modules if one.of in (None, module.module_name)]
        if cut and not any(module.low_rank_part_only for module in cut):
            ranks = [suggestion.ranks[module.module_name] for module in cut]
            gaps.append(loss_gap(one, [module.singular_values for module in cut], ranks))
    return replace(suggestion, loss_gaps=tuple(gaps))


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
        scalings={m.module_name: m.scaling for m in modules},
    )
