"""``lorakit evaluate`` and ``lorakit certify``: scores of adapters on tasks, and whether a task survived."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from lorakit import evaluation
from lorakit.cli._models import Base, Device, Dtype, FourBit, Revision, Trust, load_options
from lorakit.cli._output import EXIT_CODES, print_json, print_lines

Tasks = Annotated[
    list[str],
    typer.Option("--task", help="A file of documents, a YAML config, or a task of lm-evaluation-harness."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")]
Cache = Annotated[str | None, typer.Option(help="A directory that keeps results for later calls.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def evaluate(
    adapters: Annotated[list[str], typer.Argument(help="Adapters: directories or Hub ids.")],
    base: Base,
    task: Tasks,
    limit: Limit = None,
    cache: Cache = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Score adapters on tasks, one score a document."""
    options = load_options(device, dtype, load_in_4bit, revision, trust_remote_code)
    scores = evaluation.evaluate_adapters(base, adapters, task, limit=limit, cache=cache, options=options)
    if as_json:
        print_json({adapter: {name: one.to_dict() for name, one in found.items()} for adapter, found in scores.items()})
    else:
        print_lines(*(one.headline for found in scores.values() for one in found.values()))


def certify(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="The reference adapter and the candidate.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model: a path or Hub id, with its tokenizer.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="As in `lorakit evaluate`; may be given several times.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="How much worse the candidate may be, in the units of the scores.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of each one-sided bound.")] = 0.05,
    guard: Annotated[
        list[str] | None, typer.Option("--guard", help="More tasks on which the candidate must not be worse.")
    ] = None,
    limit: Limit = None,
    plan: Annotated[bool, typer.Option("--plan", help="Score 50 documents and say what a verdict will take.")] = False,
    cache: Cache = None,
    out: Annotated[str | None, typer.Option(help="Write the certificate as JSON.")] = None,
    html: Annotated[str | None, typer.Option(help="Write the certificate as an HTML page.")] = None,
    verify: Annotated[str | None, typer.Option(help="Verify a certificate, or that in an adapter's directory.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Whether a task survived: exit code 0 PASS, 1 FAIL, 2 bad input, 3 INCONCLUSIVE."""
    if verify is not None:
        certificate = evaluation.read_certificate(verify)
        certificate.verify()
        if os.path.isdir(verify):
            certificate.check_candidate(verify)
        _show(certificate, as_json)
        print_lines(*([] if as_json else ["The certificate verifies."]))
        return
    if not adapters or len(adapters) != 2:
        raise typer.BadParameter("give the reference adapter and the candidate.", param_hint="ADAPTERS")
    if base is None or not task or margin is None:
        missing = [name for name, value in (("--base", base), ("--task", task), ("--margin", margin)) if not value]
        raise typer.BadParameter("is needed.", param_hint=", ".join(missing))
    options = load_options(device, dtype, load_in_4bit, revision, trust_remote_code)
    settings: dict[str, Any] = {"margin": margin, "alpha": alpha, "guards": guard or (), "limit": limit}
    settings |= {"plan": plan, "cache": cache, "options": options}
    result = evaluation.certify(base, adapters[0], adapters[1], tasks=task, **settings)
    if not plan and out is not None:
        result.save(out)
    if not plan and html is not None:
        result.to_html(html)
    _show(result, as_json)
    if not plan:
        raise typer.Exit(EXIT_CODES[result.verdict])


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        print_lines(report.headline, *(f"  {line}" for line in report.details), *report.next_steps)
