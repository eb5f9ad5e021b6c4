"""The tables of an audit: roles, the least used modules, suggested ranks, all modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lorakit._format import count, extent, number, share
from lorakit._report import Table
from lorakit.lens._curvature import LossGap
from lorakit.lens.static.groups import GroupSummary
from lorakit.lens.static.recommendation import Recommendation
from lorakit.lens.static.spectra import AuditedModule
from lorakit.lens.static.suggestions import RankSuggestion

_LEAST_USED = 5


def role_table(roles: Sequence[GroupSummary], total: GroupSummary, energy: float) -> Table:
    """One row for each role, and one for all modules."""
    q = str(float(energy))
    columns: list[tuple[str, Callable[[GroupSummary], str]]] = [
        ("role", lambda g: g.name),
        ("n", lambda g: str(g.modules)),
        ("layers", lambda g: extent(g.layers)),
        ("r", lambda g: extent(g.ranks)),
        ("‖ΔW‖_F", lambda g: number(g.frobenius_norm)),
        ("energy", lambda g: share(g.energy_share)),
        ("stable", lambda g: number(g.stable_rank_mean)),
        ("effective", lambda g: number(g.effective_rank_mean)),
        ("CU", lambda g: "" if g.capacity_utilization_mean is None else f"{g.capacity_utilization_mean:.2f}"),
        ("util", lambda g: "" if g.utilization_mean is None else f"{g.utilization_mean:.2f}"),
        (f"k@{energy:g}", lambda g: _at(g.energy_rank_median, q)),
        ("p90", lambda g: _at(g.energy_rank_p90, q)),
    ]
    note = f"Means over modules. k@{energy:g} and p90: the rank that keeps {energy:.0%} of the energy in half of the "
    note += "modules, and in nine tenths."
    return Table.of("", columns, [*roles, total], note=note, total=True)


def least_used_table(modules: Sequence[AuditedModule]) -> Table:
    """The modules with the smallest utilization; empty for a handful of modules."""
    trained = sorted((m for m in modules if m.frobenius_norm), key=lambda m: m.utilization or 0.0)
    columns: list[tuple[str, Callable[[AuditedModule], str]]] = [
        ("module", lambda m: m.module_name),
        ("util", lambda m: f"{m.utilization:.2f}"),
        ("stable", lambda m: number(m.stable_rank)),
        ("r", lambda m: str(m.rank)),
    ]
    worst = trained[:_LEAST_USED] if len(trained) > _LEAST_USED else []
    return Table.of("Least used modules (util = stable rank / r)", columns, worst)


def suggestion_table(
    suggestions: Sequence[RankSuggestion], energy: float, recommendation: Recommendation | None
) -> Table:
    """One row for each policy, the recommended one with a star."""
    starred = None if recommendation is None else recommendation.policy
    columns: list[tuple[str, Callable[[RankSuggestion], str]]] = [
        ("policy", lambda s: f"★ {s.label}" if s.policy == starred else s.label),
        ("rank", lambda s: _rank_of(s, None) if s.rank is None else str(s.rank)),
        ("params", lambda s: count(s.parameters)),
        ("keeps", lambda s: f"{100 * s.energy_kept:.1f}%"),
        ("covers", lambda s: f"{s.modules_covered}/{len(s.ranks)}"),
        ("served as", lambda s: str(s.served_rank)),
        ("params then", lambda s: count(s.served_parameters)),
    ]
    return Table.of(f"Suggested ranks, to keep {energy:.0%} of the energy", columns, suggestions)


def loss_gap_table(suggestions: Sequence[RankSuggestion]) -> Table:
    """One row for each policy and each curvature; empty without curvatures."""
    gaps = [(suggestion, gap) for suggestion in suggestions for gap in suggestion.loss_gaps]
    columns: list[tuple[str, Callable[[tuple[RankSuggestion, LossGap]], str]]] = [
        ("policy", lambda row: row[0].label),
        ("cut", lambda row: row[1].where),
        ("rank", lambda row: _rank_of(row[0], row[1].of)),
        ("at least", lambda row: number(row[1].lower)),
        ("at most", lambda row: number(row[1].upper)),
    ]
    note = "Local estimates: (μ/2) and (L/2) Σ σ² of what is cut. They hold near the weights where μ and L were "
    note += "measured, if these are a minimum of the loss. A module's are for a cut of it alone."
    if all(gap.lower is None for _, gap in gaps):
        del columns[3]
    return Table.of("More loss at the suggested ranks", columns, gaps, note=note)


def _rank_of(suggestion: RankSuggestion, module_name: str | None) -> str:
    ranks = suggestion.ranks
    return extent((min(ranks.values()), max(ranks.values()))) if module_name is None else str(ranks[module_name])


def module_table(modules: Sequence[AuditedModule]) -> Table:
    """One row for each module."""
    thresholds = next((list(m.energy_rank) for m in modules if m.energy_rank), [])
    columns: list[tuple[str, Callable[[AuditedModule], str]]] = [
        ("module", lambda m: m.module_name),
        ("r", lambda m: str(m.rank)),
        ("scaling", lambda m: number(m.scaling)),
        ("‖ΔW‖_F", lambda m: number(m.frobenius_norm)),
        ("/ ‖W‖_F", lambda m: number(m.relative_norm)),
        ("‖ΔW‖₂", lambda m: number(m.spectral_norm)),
        ("stable", lambda m: number(m.stable_rank)),
        ("effective", lambda m: number(m.effective_rank)),
        ("top 1", lambda m: share(m.top1_share)),
        ("CU", lambda m: number(m.capacity_utilization)),
        ("util", lambda m: number(m.utilization)),
        *((f"k@{float(q):g}", _energy_rank_at(q)) for q in thresholds),
        ("knee", lambda m: "" if m.knee is None else str(m.knee)),
        ("beside", lambda m: "; ".join(f"{label} {_statistics(values)}" for label, values in m.beside.items())),
    ]
    return Table.of("Modules", columns, modules, long=True)


def _at(ranks: Mapping[str, int] | None, threshold: str) -> str:
    return "" if ranks is None else str(ranks[threshold])


def _energy_rank_at(threshold: str) -> Callable[[AuditedModule], str]:
    return lambda m: _at(m.energy_rank, threshold)


def _statistics(values: Mapping[str, float]) -> str:
    return f"{number(values['mean'])} ± {number(values['std'])} ({number(values['min'])}…{number(values['max'])})"
