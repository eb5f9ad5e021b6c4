"""``lorakit bench``: lower ranks against probes at a high rank, or PEFT methods against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit import experiments
from lorakit.cli._executors import Backend, ShardOf, Workers, executor_of
from lorakit.cli._output import EXIT_CODES, print_json, print_lines, show


def bench(
    file: Annotated[
        str,
        typer.Argument(help="A YAML file with the arguments of `lorakit.experiments.bench`, or of `compare_methods`."),
    ],
    backend: Backend = "local",
    workers: Workers = None,
    shard: ShardOf = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="FILE is a bench.json or methods.json: compute all of its figures anew from its scores."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Test lower ranks against probes, or compare methods: exit code 0 one PASSes, 1 all FAIL, 2 bad input, 3 else.

    A comparison of methods without a margin has no verdict: exit code 0 once it is finished.
    """
    # Here, since they import transformers, for which every other command would wait.
    from lorakit.experiments._bench_file import read_either_file
    from lorakit.experiments._compare_report import JSON_NAME

    if verify:
        read: Any = experiments.read_methods if Path(file).name == JSON_NAME else experiments.read_bench
        report = read(file)
        report.verify()
        show(report, as_json)
        print_lines(*([] if as_json else ["The bench verifies."]))
        return
    name, arguments = read_either_file(file)
    function: Any = getattr(experiments, name)
    with executor_of(backend, workers) as executor:
        found = function(**arguments, executor=executor, shard=shard)
    if as_json:
        print_json(found.to_dict())
    else:
        show(found, as_json=False)
    raise typer.Exit(0 if found.verdict is None else EXIT_CODES[found.verdict])
