"""``lorakit servable``: what each server will compute for an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit import serving
from lorakit._format import visible
from lorakit.cli._output import print_json

_WORDS = {"right": "right", "wrong": "WRONG", "refused": "refused", "own format": "needs its own format"}


def servable(
    adapter: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    servers: Annotated[
        str | None, typer.Option("--for", help="Servers, with commas between; default: all that are known.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON on stdout.")] = False,
) -> None:
    """What each server will compute for an adapter; exit code 1 if one named by --for would be wrong."""
    checks = serving.check_all(adapter, servers)
    if as_json:
        print_json({check.server: check.to_dict() for check in checks})
    else:
        _print(adapter, checks)
    if servers is not None and any(check.has_errors for check in checks):
        raise typer.Exit(1)


def _print(adapter: str, checks: tuple[serving.ServerCheck, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for heading in ("server", "version", "verdict", "why, and what it needs"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        style = "" if check.verdict == "right" else "red" if check.verdict == "wrong" else "yellow"
        why = [" ".join(check.flags)] if check.flags else []
        why += [] if check.verdict == "right" else [check.headline]
        cells = (check.server, check.version, _WORDS[check.verdict], " ".join(why))
        table.add_row(*(Text(visible(cell), style=style if i == 2 else "") for i, cell in enumerate(cells)))
    console.print(Text(visible(adapter), style="bold"))
    console.print(table)
    steps = dict.fromkeys(step for check in checks for step in check.next_steps)
    if steps:
        console.print("What to do next:")
        for step in steps:
            console.print(Text(f"  {visible(step)}"), soft_wrap=True)
