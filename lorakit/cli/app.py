"""The command ``lorakit``: its subcommands, and what becomes of errors."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from lorakit._format import visible
from lorakit._version import __version__
from lorakit.cli._shell import in_a_shell
from lorakit.cli.agree import agree
from lorakit.cli.bench import bench
from lorakit.cli.certify import certify, evaluate
from lorakit.cli.demo import demo
from lorakit.cli.fleet import fleet
from lorakit.cli.inspect import alignment, audit, compare, report, weights
from lorakit.cli.probe import probe
from lorakit.cli.rewrite import compress, export, merge
from lorakit.cli.select import select
from lorakit.cli.servable import servable
from lorakit.cli.surgery import surgery

app = typer.Typer(name="lorakit", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"lorakit {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Audit, compress, merge, edit and train LoRA adapters of Hugging Face PEFT."""


for _command in (
    audit,
    compare,
    alignment,
    weights,
    report,
    compress,
    merge,
    export,
    servable,
    probe,
    select,
    surgery,
    evaluate,
    certify,
    agree,
    bench,
    fleet,
    demo,
):
    app.command()(in_a_shell(_command))


def main() -> None:
    """Run the command; exit code 0, 1 for a finding of severity error, 2 for wrong usage and bad input."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not (hasattr(error, "format_message") and hasattr(error, "show")):
            raise
        said = io.StringIO()  # of wrong usage: what was typed is printed again
        error.show(file=said)
        sys.stderr.write("\n".join(map(visible, said.getvalue().split("\n"))))
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    raise SystemExit(code)
