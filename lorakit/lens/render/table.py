"""Reports on a terminal: title, details, tables, findings and next steps, with control characters as escapes."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lorakit._format import visible
from lorakit._report import Report, Table
from lorakit.errors import Finding

_SHOWN = 3  # findings of one kind
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print a report as wide as the console is; long names are cut off, and long tables left out."""
    console.print(Text(visible(report.title), style="bold"))
    console.print(Text(visible(report.headline)))
    for line in report.details:
        console.print(Text(visible(line)))
    for table in report.tables():
        if table.rows and not table.long:
            console.print()
            print_table(table, console)
    print_findings(getattr(report, "findings", ()), console)
    print_next_steps(report.next_steps, console)


def print_table(table: Table, console: Console) -> None:
    """Print one table; only its first column gives way where the console is too narrow."""
    if table.title:
        console.print(Text(visible(table.title), style="italic"))
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    for i, heading in enumerate(table.headings):
        if i:
            shown.add_column(Text(visible(heading)), justify="right", no_wrap=True)
        else:
            shown.add_column(Text(visible(heading)), overflow="ellipsis")
    for i, row in enumerate(table.rows):
        if table.total and i == len(table.rows) - 1:
            shown.add_section()
        shown.add_row(*(Text(visible(cell)) for cell in row))
    console.print(shown)
    if table.note:
        console.print(Text(visible(table.note), style="dim"))


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print findings, at most three of each kind."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.severity, finding.code), []).append(finding)
    console.print(Text("\nfindings" if kinds else "\nno findings", style="italic"))
    for (severity, code), same in kinds.items():
        for finding in same[:_SHOWN]:
            console.print(
                Text.assemble((f"{severity} ", _STYLES[severity]), (f"{code}: ", "bold"), visible(finding.message))
            )
        if len(same) > _SHOWN:
            console.print(Text(f"  … and {len(same) - _SHOWN} more {code}", style="dim"))


def print_next_steps(steps: Sequence[str], console: Console) -> None:
    """Print what to run next, each step on one unbroken line that can be pasted."""
    if steps:
        console.print(Text("\nnext steps", style="italic"))
    for step in steps:
        console.print(Text(f"  {visible(step)}"), soft_wrap=True)
