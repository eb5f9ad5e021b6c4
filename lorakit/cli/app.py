"""The command ``lorakit``: its subcommands, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorakit._version import __version__
from lorakit.cli._output import print_json
from lorakit.cli.agree import agree
from lorakit.cli.bench import bench
from lorakit.cli.certify import certify, evaluate
from lorakit.cli.demo import demo
from lorakit.cli.inspect import alignment, audit, compare, weights
from lorakit.cli.probe import probe
from lorakit.cli.rewrite import compress, export, merge
from lorakit.cli.servable import servable
from lorakit.cli.surgery import surgery
from lorakit.errors import LorakitError

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, which some versions of typer bring along

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
    compress,
    merge,
    export,
    servable,
    probe,
    surgery,
    evaluate,
    certify,
    agree,
    bench,
    demo,
):
    app.command()(_command)


def _print_error(kind: str, message: str) -> None:
    print_json({"error": {"type": kind, "message": message}})


def main() -> None:
    """Run the command; exit code 0, 1 for a finding of severity error, 2 for wrong usage and bad input.

    With --json an error is an object on stdout too: ``{"error": {"type": …, "message": …}}``.
    """
    as_json = "--json" in sys.argv[1:]
    try:
        if not as_json:
            app()
        code = app(standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        _print_error("UsageError", str(getattr(error, "format_message", error.__str__)()))
        raise SystemExit(2) from None
    except (LorakitError, ValueError, OSError) as error:
        if as_json:
            _print_error(type(error).__name__, str(error))
            raise SystemExit(2) from None
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(f"lorakit: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
