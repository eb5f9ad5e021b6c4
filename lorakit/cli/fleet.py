"""``lorakit fleet``: audit all adapters below a directory."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from lorakit import fleet as fleets
from lorakit import lens
from lorakit.cli._executors import Backend, executor_of
from lorakit.cli._output import show


def fleet(
    adapters: Annotated[list[str], typer.Argument(help="A directory of adapters; or adapters and Hub ids.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", help="All directories below, not only the directory's children.")
    ] = False,
    csv: Annotated[str | None, typer.Option(help="Also write a CSV file, one line an adapter (needs pandas).")] = None,
    parquet: Annotated[str | None, typer.Option(help="Also write a Parquet file (needs pandas and pyarrow).")] = None,
    sarif: Annotated[str | None, typer.Option(help="Also write the findings as a SARIF 2.1.0 file.")] = None,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    backend: Backend = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: 1 (local), or one for each CPU (ray).", show_default=False),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only each N-th adapter, from the I-th on.", show_default=False),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Directory of records: what is in it, by the files' hash, is not read again.")
    ] = None,
    near: Annotated[float, typer.Option(help="Cosine from which on two adapters are near duplicates.")] = 0.99,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Every adapter of a fleet: size, waste, findings, outliers and duplicates; exit code 1 if one of them has an error
    or cannot be read.
    """
    source = adapters[0] if len(adapters) == 1 and os.path.isdir(adapters[0]) else adapters
    with executor_of(backend, workers) as executor:
        report = fleets.audit(
            source, recursive=recursive, executor=executor, shard=shard, cache=cache, near=near, progress=not as_json
        )
    for path, write in (
        (csv, fleets.write_csv),
        (parquet, fleets.write_parquet),
        (sarif, fleets.write_sarif),
        (html, lens.write_html),
    ):
        if path is not None:
            write(report, path)
    show(report, as_json)
