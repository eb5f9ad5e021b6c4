"""The option by which `lorakit merge` measures what is kept of each adapter's own task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli._certified import Certification

if TYPE_CHECKING:
    from lorakit.evaluation import LoadOptions

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
