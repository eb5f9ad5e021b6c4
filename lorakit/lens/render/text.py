"""How an audit's numbers are written, on the screen and in HTML: the same columns in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorakit._format import count, extent, number, share
from lorakit.lens.static.report import AuditedModule, AuditReport, GroupSummary
from lorakit.lens.static.suggestions import RankSuggestion

Column = tuple[str, Callable[[GroupSummary], str]]


def _at(ranks: Mapping[str, int] | None, threshold: str) -> str:
    return "" if ranks is None else str(ranks[threshold])


def columns_of(report: AuditReport) -> list[Column]:
    """Headings, and what to write under them, for groups of modules."""
    q = str(float(report.energy))
    return [
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
        (f"k@{report.energy:g}", lambda g: _at(g.energy_rank_median, q)),
        ("p90", lambda g: _at(g.energy_rank_p90, q)),
    ]


def module_columns(report: AuditReport) -> list[tuple[str, Callable[[AuditedModule], str]]]:
    """The same for single modules."""
    thresholds = next((list(m.energy_rank) for m in report.modules if m.energy_rank), [])
    return [
        ("module", lambda m: m.module_name),
        ("r", lambda m: str(m.rank)),
        ("scaling", lambda m: number(m.scaling)),
        ("‖ΔW‖_F", lambda m: number(m.frobenius_norm)),
        ("‖ΔW‖₂", lambda m: number(m.spectral_norm)),
        ("stable", lambda m: number(m.stable_rank)),
        ("effective", lambda m: number(m.effective_rank)),
        ("CU", lambda m: number(m.capacity_utilization)),
        ("util", lambda m: number(m.utilization)),
        *((f"k@{float(q):g}", _energy_rank_at(q)) for q in thresholds),
        ("knee", lambda m: "" if m.knee is None else str(m.knee)),
        ("beside", lambda m: "; ".join(f"{label} {_statistics(values)}" for label, values in m.beside.items())),
    ]


def _energy_rank_at(threshold: str) -> Callable[[AuditedModule], str]:
    return lambda m: _at(m.energy_rank, threshold)


def _statistics(values: Mapping[str, float]) -> str:
    return f"{number(values['mean'])} ± {number(values['std'])} ({number(values['min'])}…{number(values['max'])})"


def suggestion_columns() -> list[tuple[str, Callable[[RankSuggestion], str]]]:
    """The same for suggested ranks."""
    return [
        ("policy", lambda s: s.policy.replace("_", " ")),
        (
            "rank",
            lambda s: str(s.rank) if s.rank is not None else extent((min(s.ranks.values()), max(s.ranks.values()))),
        ),
        ("params", lambda s: count(s.parameters)),
        ("keeps", lambda s: f"{100 * s.energy_kept:.1f}%"),
        ("covers", lambda s: f"{s.modules_covered}/{len(s.ranks)}"),
        ("served as", lambda s: str(s.served_rank)),
        ("params then", lambda s: count(s.served_parameters)),
    ]


def facts(report: AuditReport) -> list[tuple[str, str]]:
    """What to know before the tables."""
    total = report.total
    dtypes = ", ".join(sorted({module.dtype for module in report.modules}))
    beside = f", and {count(report.parameters_beside)} beside" if report.parameters_beside else ""
    part = [m for m in report.modules if m.low_rank_part_only]
    found = [
        ("type", report.peft_type + (f" (low-rank part only, in {len(part)} modules)" if part else "")),
        ("updates", f"{total.modules} modules, {count(total.parameters)} parameters ({dtypes}){beside}"),
    ]
    if report.base_model:
        found.insert(1, ("base model", report.base_model))
    return found
