"""``lorakit bench``: probes at a high rank, and what lower ranks do to the task."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit import experiments
from lorakit.cli._executors import Backend, ShardOf, Workers, executor_of
from lorakit.cli._output import EXIT_CODES, print_json, print_lines, show


def bench(
    file: Annotated[str, typer.Argument(help="A YAML file with the arguments of `lorakit.experiments.bench`.")],
    backend: Backend = "local",
    workers: Workers = None,
    shard: ShardOf = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="FILE is a bench.json: compute all of its figures anew from its scores.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Train probes, audit them, test lower ranks: exit code 0 a variant PASSes, 1 all FAIL, 2 bad input, 3 else."""
    if verify:
        report = experiments.read_bench(file)
        report.verify()
        show(report, as_json)
        print_lines(*([] if as_json else ["The bench verifies."]))
        return
    arguments = experiments.read_bench_file(file)
    with executor_of(backend, workers) as executor:
        found = experiments.bench(**arguments, executor=executor, shard=shard)
    if as_json:
        print_json(found.to_dict())
    else:
        show(found, as_json=False)
    raise typer.Exit(EXIT_CODES[found.verdict])
