"""An audit on the screen: many layers folded into what a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.lens._text import columns_of, facts, number, suggestion_columns

if TYPE_CHECKING:
    from lorakit.errors import Finding
    from lorakit.lens._report import AuditReport

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
    _print_findings(report, console)


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


def _print_findings(report: AuditReport, console: Console) -> None:
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in report.findings:
        kinds.setdefault((finding.severity, finding.code), []).append(finding)
    console.print(Text("\nfindings" if kinds else "\nno findings", style="italic"))
    for (severity, code), findings in kinds.items():
        for finding in findings[:_SHOWN]:
            console.print(Text.assemble((f"{severity} ", _STYLES[severity]), (f"{code}: ", "bold"), finding.message))
        if len(findings) > _SHOWN:
            console.print(Text(f"  … and {len(findings) - _SHOWN} more {code}", style="dim"))
