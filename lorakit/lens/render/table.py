"""Reports on the screen: many layers folded into what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit._format import number, share
from lorakit.lens.render.text import columns_of, facts, suggestion_columns

if TYPE_CHECKING:
    from lorakit.errors import Finding
    from lorakit.lens.static.alignment import AlignmentReport
    from lorakit.lens.static.compare import ComparedGroup, ComparedModule, ComparisonReport
    from lorakit.lens.static.report import AuditReport

_WORST = 5
_SHOWN = 3  # findings of one kind
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def print_report(report: AuditReport, console: Console) -> None:
    """Print roles, the least used modules, suggestions and findings. It fits 80 columns, but for long names."""
    console.print(Text(report.path, style="bold"))
    for label, value in facts(report):
        console.print(Text(f"{label}: {value}"))
    if report.roles:
        columns = columns_of(report)
        table = _table([heading for heading, _ in columns])
        for group in report.roles:
            table.add_row(*(Text(render(group)) for _, render in columns))
        table.add_section()
        table.add_row(*(Text(render(report.total)) for _, render in columns))
        console.print(table)
        console.print(
            "Means over modules, and the ranks that keep that share of the energy in half and in nine tenths of them.",
            style="dim",
        )
    _print_least_used(report, console)
    if report.suggestions:
        console.print()
        named = suggestion_columns()
        table = _table([heading for heading, _ in named], f"Ranks that keep {report.energy:.0%} of the energy")
        for suggestion in report.suggestions:
            table.add_row(*(Text(render(suggestion)) for _, render in named))
        console.print(table)
    print_findings(report.findings, console)


def print_comparison(report: ComparisonReport, console: Console) -> None:
    """Print roles, the modules that are not safe, and findings. It fits 80 columns, but for long names."""
    for label, path, peft_type in (("A", report.path_a, report.peft_type_a), ("B", report.path_b, report.peft_type_b)):
        console.print(Text.assemble(f"{label}: ", (path, "bold"), f" ({peft_type})"))
    console.print(
        f"{report.total.modules} modules compared; in A alone: {len(report.only_a)}, in B alone: {len(report.only_b)}."
    )
    if report.roles:
        table = _table(
            ["role", "n", "cosine", "±chance", "out", "chance", "in", "chance", "A's", "safe", "red", "conf", "imb"]
        )
        for group in report.roles:
            table.add_row(*_compared(group))
        table.add_section()
        table.add_row(*_compared(report.total))
        console.print(table)
        console.print(
            "cosine of the updates; overlap of output and input subspaces; A's share of the norms; verdicts.",
            style="dim",
        )
    _print_unsafe(report, console)
    print_findings(report.findings, console)


def _compared(group: ComparedGroup) -> list[Text]:
    overlaps = (
        group.output_overlap_mean,
        group.random_output_overlap_mean,
        group.input_overlap_mean,
        group.random_input_overlap_mean,
    )
    cells = [
        group.name,
        str(group.modules),
        "" if group.cosine is None else f"{group.cosine:+.3f}",
        "" if group.random_cosine is None else f"{group.random_cosine:.0e}",
        *("" if value is None else f"{value:.3f}" for value in overlaps),
        share(group.share_a),
        *(str(count) for count in group.verdicts.values()),
    ]
    return [Text(cell) for cell in cells]


def _print_unsafe(report: ComparisonReport, console: Console) -> None:
    def alarm(module: ComparedModule) -> tuple[bool, float]:
        return module.verdict != "conflicting", -abs(module.cosine or 0.0)

    unsafe = sorted((m for m in report.modules if m.verdict not in ("safe", None)), key=alarm)
    if not unsafe:
        return
    console.print(Text("\nnot safe to add as they are", style="italic"))
    for module in unsafe[:_WORST]:
        ratio = "" if module.sigma_ratio is None else f", σ₁ {number(module.sigma_ratio)}:1"
        said = f"{module.verdict} ({module.reason}), cosine {number(module.cosine)}{ratio}"
        console.print(Text(f"  {said}  {module.module_name}", no_wrap=True, overflow="ellipsis"))
    if len(unsafe) > _WORST:
        console.print(Text(f"  … and {len(unsafe) - _WORST} more", style="dim"))


def print_alignment(report: AlignmentReport, console: Console) -> None:
    """Print a line a role, with what chance gives, and output against down projections."""
    console.print(Text(report.path, style="bold"))
    if report.roles:
        table = _table(["role", "n", "d_out", "|cos|", "chance", "k", "overlap", "chance"])
        for group in report.roles:
            table.add_row(
                Text(group.name),
                str(len(group.modules)),
                str(group.d_out),
                number(group.similarity_mean),
                number(group.random_similarity),
                str(group.k),
                number(group.overlap_mean),
                number(group.random_overlap),
            )
        pairs = report.within_layer
        if pairs:
            table.add_section()
            sums = [
                sum(getattr(pair, name) for pair in pairs) / len(pairs)
                for name in ("similarity", "random_similarity", "overlap", "random_overlap")
            ]
            similarity, by_chance, overlap, overlap_by_chance = map(number, sums)
            ks = str(min(pair.k for pair in pairs))
            row = [str(len(pairs)), str(pairs[0].d_out), similarity, by_chance, ks, overlap, overlap_by_chance]
            table.add_row("output–down", *row)
        console.print(table)
        console.print(
            "Means between layers: |cos| of the leading output directions, overlap of the top k; last: within layers.",
            style="dim",
        )
    print_findings(report.findings, console)


def _table(headings: list[str], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), show_edge=False, title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if i else "left", no_wrap=True)
    return table


def _print_least_used(report: AuditReport, console: Console) -> None:
    measured = [m for m in report.modules if m.frobenius_norm]
    if len(measured) <= _WORST:
        return
    worst = sorted(measured, key=lambda m: m.utilization or 0.0)[:_WORST]
    console.print(Text("\nleast used (stable rank / r)", style="italic"))
    for module in worst:
        ratio = f"{module.utilization:.2f} ({number(module.stable_rank)} of {module.rank})"
        console.print(Text(f"  {ratio:18} {module.module_name}", no_wrap=True, overflow="ellipsis"))


def print_findings(found: Sequence[Finding], console: Console) -> None:
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        kinds.setdefault((finding.severity, finding.code), []).append(finding)
    console.print(Text("\nfindings" if kinds else "\nno findings", style="italic"))
    for (severity, code), findings in kinds.items():
        for finding in findings[:_SHOWN]:
            console.print(Text.assemble((f"{severity} ", _STYLES[severity]), (f"{code}: ", "bold"), finding.message))
        if len(findings) > _SHOWN:
            console.print(Text(f"  … and {len(findings) - _SHOWN} more {code}", style="dim"))
