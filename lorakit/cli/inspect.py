"""``lorakit audit``, ``compare``, ``alignment``, ``weights`` and ``report``: look, and change nothing."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, cast

import typer

from lorakit import lens
from lorakit.cli._output import check_share, numbers_of, show


class By(StrEnum):
    """What has a row of its own."""

    group = "group"
    expert = "expert"


_Base = Annotated[
    str | None,
    typer.Option(help="Directory or file of the base model's weights: DoRA and SPECLORA by their whole updates."),
]
_By = Annotated[By, typer.Option("--by", help="One row for a group of experts, or for each expert.")]


def _literal(by: By) -> Literal["group", "expert"]:
    return "expert" if by is By.expert else "group"


def audit(
    adapter: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    base: Annotated[
        str | None, typer.Option(help="The base model's directory: whole updates of DoRA and SPECLORA, relative norms.")
    ] = None,
    suggest_ranks: Annotated[bool, typer.Option("--suggest-ranks", help="Suggest ranks, by several policies.")] = False,
    energy: Annotated[float, typer.Option(help="Share of each update's energy that suggested ranks keep.")] = 0.9,
    budget: Annotated[
        str | None, typer.Option(help="Suggest ranks under a budget: 2000000, 2M (parameters), 4MB (bytes).")
    ] = None,
    smoothness: Annotated[
        float | None,
        typer.Option(help="L of the loss in all weights: bound what suggested ranks may cost in loss."),
    ] = None,
    strong_convexity: Annotated[
        float | None, typer.Option(help="μ of the loss, for the bound from below; needs --smoothness.")
    ] = None,
    by: _By = By.group,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    plots: Annotated[str | None, typer.Option(help="Also write figures into this directory.")] = None,
) -> None:
    """Spectra, ranks and findings of an adapter at rest; exit code 1 if one of the findings is an error."""
    check_share("--energy", energy)
    if strong_convexity is not None and smoothness is None:
        raise typer.BadParameter("needs --smoothness.", param_hint="--strong-convexity")
    report = lens.audit(
        adapter,
        base=base,
        energy=energy,
        suggest_ranks=suggest_ranks,
        budget=budget,
        curvature=None if smoothness is None else lens.Curvature(smoothness, strong_convexity),
        by=_literal(by),
    )
    if html is not None:
        lens.write_html(report, html)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json)


def compare(
    a: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    energy: Annotated[float, typer.Option(help="Share of each update's energy in the directions compared.")] = 1.0,
    weights: Annotated[
        str | None, typer.Option(help="Weights of the merge, with a comma between; default: 1/2.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Merges to forecast, of linear,svd,ties,dare; ties and dare form each ΔW: slow.")
    ] = "linear,svd",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of those merges that are cut.")] = None,
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of dare.")] = 0,
    by: _By = By.group,
    base: _Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    plots: Annotated[str | None, typer.Option(help="Also write figures into this directory.")] = None,
) -> None:
    """Two adapters' shared directions and agreement, and their merge's forecast; exit code 1 for findings of errors."""
    check_share("--energy", energy)
    check_share("--density", density)
    report = lens.compare(
        a,
        b,
        energy=energy,
        weights=numbers_of("--weights", weights),
        methods=cast(Any, methods.split(",")),
        rank=rank,
        density=density,
        seed=seed,
        by=_literal(by),
        base=base,
    )
    if html is not None:
        lens.write_html(report, html)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json)


def alignment(
    adapter: Annotated[str, typer.Argument(help="A directory, a .safetensors or .bin file, or a Hub id.")],
    k: Annotated[int, typer.Option(min=1, help="How many leading directions of each update.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    plots: Annotated[str | None, typer.Option(help="Also write figures into this directory.")] = None,
) -> None:
    """Output directions across and within layers; exit code 1 if one of the findings is an error."""
    report = lens.alignment(adapter, k=k)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json)


def weights(
    base: Annotated[str, typer.Argument(help="The model before: a directory of safetensors, or a file.")],
    tuned: Annotated[str, typer.Argument(help="The model after fine-tuning.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter that approximates the change.")] = None,
    module: Annotated[
        list[str] | None, typer.Option("--module", help="Only weights of this name, such as q_proj; may be repeated.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="How many leading singular vectors to compare.")] = 64,
    full: Annotated[bool, typer.Option("--full", help="Compare all singular vectors; takes full SVDs.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    plots: Annotated[str | None, typer.Option(help="Also write figures into this directory.")] = None,
) -> None:
    """What fine-tuning did to a model's weights; exit code 1 if one of the findings is an error."""
    report = lens.compare_weights(
        base, tuned, adapter=adapter, modules=module, rank=None if full else rank, device=device
    )
    if html is not None:
        lens.write_html(report, html)
    if plots is not None:
        lens.write_plots(report, plots)
    show(report, as_json)


def report(
    runs: Annotated[list[str], typer.Argument(help="Output directories of trainings, or their spectra.jsonl.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    plots: Annotated[str | None, typer.Option(help="Also write figures into this directory.")] = None,
) -> None:
    """A training in one page, from what SpectralCallback wrote; several are compared."""
    found = lens.training_report(*runs)
    if html is not None:
        lens.write_html(found, html)
    if plots is not None:
        lens.write_plots(found, plots)
    show(found, as_json)
