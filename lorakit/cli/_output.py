"""What commands print: JSON alone on stdout, or a table folded by role."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lorakit._format import visible
from lorakit.naming.roles import group_of

if TYPE_CHECKING:
    from lorakit._report import Report

EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
STDOUT: ContextVar[TextIO] = ContextVar("STDOUT")
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the adapter itself, or one that lorakit did not write.")
]
Column = tuple[str, Callable[[Sequence[Any]], str]]


def print_json(report: dict[str, Any]) -> None:
    """Print data as JSON on the real stdout, also while everything else that is printed goes to stderr."""
    STDOUT.get(sys.stdout).write(json.dumps(report, allow_nan=False) + "\n")


def show(report: Report, as_json: bool) -> None:
    """Print a report as JSON or as tables; exit code 1 if one of its findings is an error."""
    if as_json:
        print_json(report.to_dict())
    else:
        from rich.console import Console

        from lorakit.lens.render.table import print_report

        print_report(report, Console())
    fail_if_errors(report)


def fail_if_errors(report: Report) -> None:
    """Exit code 1 if one of the report's findings is an error."""
    if report.has_errors:
        raise typer.Exit(1)


def check_share(option: str, value: float | None) -> None:
    """A usage error for the value of an option that was given and is no share."""
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter("must be a share in (0, 1].", param_hint=option)


def numbers_of(option: str, given: str | None) -> list[float] | None:
    """The numbers of an option; a usage error for anything else."""
    try:
        return None if given is None else [float(number) for number in given.split(",")]
    except ValueError:
        raise typer.BadParameter("must be numbers with commas between.", param_hint=option) from None


def print_folded(title: str, modules: Iterable[Any], columns: Sequence[Column]) -> None:
    """One line for each role, or last component of a name where there is none, and one for all."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[Any]] = {}
    for module in modules:
        groups.setdefault(group_of(module.module_name), []).append(module)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("role", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rows in groups.items():
        table.add_row(Text(visible(name)), *(Text(render(rows)) for _, render in columns))
    table.add_section()
    every = [row for rows in groups.values() for row in rows]
    table.add_row("all", *(Text(render(every)) for _, render in columns))
    console = Console(soft_wrap=False)
    console.print(Text(visible(title), style="bold"))
    console.print(table)


def print_lines(*lines: str) -> None:
    from rich.console import Console
    from rich.text import Text

    for line in lines:
        Console().print(Text(visible(line)), soft_wrap=True)  # a command that is printed can be pasted
