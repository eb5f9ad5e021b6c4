"""The options of `lorakit merge`: how to merge, and what is kept of each adapter's own task."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli._certified import Certification
from lorakit.cli._output import check_share, numbers_of

if TYPE_CHECKING:
    from lorakit.evaluation import LoadOptions


class MethodName(StrEnum):
    """The ways to merge."""

    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare = "dare"


Retain = Annotated[
    list[str] | None,
    typer.Option(help="ADAPTER=TASK: measure what is kept of an adapter's own task; may be repeated."),
]


def retained(retain: list[str], certification: Certification, base: str | None, options: LoadOptions) -> dict[str, Any]:
    """The arguments of `lorakit.merging.merge` about the tasks that are measured."""
    given = {"--task": certification.task, "--margin": certification.margin, "--guard": certification.guard}
    idle = [option for option, value in given.items() if value]
    if idle:
        raise typer.BadParameter("does not go with --retain.", param_hint=", ".join(idle))
    if base is None:
        raise typer.BadParameter("is needed with --retain.", param_hint="--base")
    tasks: dict[str, list[str]] = {}
    for one in retain:
        adapter, equals, task = one.partition("=")
        if not (adapter and equals and task):
            raise typer.BadParameter(f"must be ADAPTER=TASK; got {one!r}.", param_hint="--retain")
        tasks.setdefault(adapter, []).append(task)
    alpha = 0.05 if certification.alpha is None else certification.alpha
    return {
        "tasks": tasks,
        "alpha": alpha,
        "limit": certification.limit,
        "cache": certification.cache,
        "options": options,
    }


def merge_options(
    weights: str | None, method: MethodName, rank: int | None, energy: float | None, density: float | None
) -> dict[str, Any]:
    """The arguments of `lorakit.merging.merge` about how. Raises: typer.BadParameter."""
    if rank is not None and energy is not None:
        raise typer.BadParameter("give one of them.", param_hint="--rank, --energy")
    dense = method in (MethodName.ties, MethodName.dare)
    if dense != (density is not None):
        raise typer.BadParameter("is for ties and dare, which need it.", param_hint="--density")
    check_share("--energy", energy)
    check_share("--density", density)
    return {
        "weights": numbers_of("--weights", weights),
        "method": method.value,
        "rank": rank,
        "energy": energy,
        "density": density,
    }
