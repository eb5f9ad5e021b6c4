"""The ranks that a bench tests: what the audits of all probes suggest, by policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import digest
from lorakit.experiments._bench_settings import Policy
from lorakit.lens import AuditReport, RankSuggestion
from lorakit.lens.static.suggestions import covering, suggestion_of


@dataclass(frozen=True)
class BenchRanks:
    """Ranks that one policy or several agree on. `label` names files: the rank, or a hash of each module's."""

    label: str
    policies: tuple[str, ...]
    suggestion: RankSuggestion


def ranks_to_test(audits: Sequence[AuditReport], policies: Sequence[Policy], energy: float) -> list[BenchRanks]:
    """Each policy's ranks, the same for all seeds: module by module the median over the seeds' suggestions.

    The median is one of the seeds' own ranks; of an even number of seeds the smaller of the two in the middle. Policies
    with equal ranks are one entry.
    Raises: EvaluationError for a probe whose updates are zero or not finite.
    """
    for audit in audits:
        broken = [module.module_name for module in audit.modules if not module.spectral_norm]
        if broken:
            raise EvaluationError(
                f"The probe in {audit.path!r} has no update in {len(broken)} of {len(audit.modules)} modules (such as "
                f"{broken[0]}), so that no rank can be suggested for them. Target other modules, or train it longer."
            )
    first = audits[0]
    found: dict[str, BenchRanks] = {}
    for policy in policies:
        if isinstance(policy, int):
            name, ranks = f"rank {policy}", dict.fromkeys((m.module_name for m in first.modules), policy)
        else:
            name, ranks = policy, _median([_suggested(audit, policy).ranks for audit in audits])
        suggestion = suggestion_of(name, first.modules, str(float(energy)), ranks)
        label = _label(suggestion.ranks)
        before = found[label].policies if label in found else ()
        found[label] = BenchRanks(label, (*before, name), found[label].suggestion if before else suggestion)
    return list(found.values())


def _suggested(audit: AuditReport, policy: str) -> RankSuggestion:
    return next(suggestion for suggestion in audit.suggestions if suggestion.policy == policy)


def _median(by_seed: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: covering([ranks[name] for ranks in by_seed], 0.5) for name in by_seed[0]}


def _label(ranks: Mapping[str, int]) -> str:
    only = set(ranks.values())
    return f"r{only.pop()}" if len(only) == 1 else f"ranks-{digest(dict(ranks))[:8]}"
