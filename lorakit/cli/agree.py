"""``lorakit agree``: how far a candidate predicts what the reference predicts, without labels."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit import evaluation
from lorakit.cli._data import Columns, Length, Split, named_columns
from lorakit.cli._models import Base, Device, Dtype, FourBit, Revision, Trust, load_options
from lorakit.cli._output import EXIT_CODES, print_json, print_lines


def agree(
    reference: Annotated[str, typer.Argument(help="The reference adapter: a directory or Hub id.")],
    candidate: Annotated[str, typer.Argument(help="The candidate: a directory or Hub id.")],
    base: Base,
    data: Annotated[str, typer.Option(help="Prompts: a .txt file of paragraphs, or any source of `lorakit probe`.")],
    margin: Annotated[
        float | None,
        typer.Option(help="Nats a token that the candidate may differ, for a verdict.", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of each one-sided bound.")] = 0.05,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Rows to use; default: all.")] = None,
    length: Length = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents a batch.")] = 1,
    columns: Columns = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Compare the next tokens of two adapters on your own prompts; with --margin, exit codes as `lorakit certify`."""
    report = evaluation.agreement(
        base,
        reference,
        candidate,
        data,
        margin=margin,
        alpha=alpha,
        num_examples=num_examples,
        length=length,
        batch_size=batch_size,
        options=load_options(device, dtype, load_in_4bit, revision, trust_remote_code),
        columns=named_columns(columns),
        split=split,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_lines(report.headline, *(f"  {line}" for line in report.details), *report.next_steps)
    if report.verdict is not None:
        raise typer.Exit(EXIT_CODES[report.verdict])
