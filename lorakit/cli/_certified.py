"""The options by which commands that write an adapter also say whether its task survived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli._output import EXIT_CODES, print_lines

if TYPE_CHECKING:
    from lorakit._report import Report
    from lorakit.evaluation import Certificate, LoadOptions

Task = Annotated[
    list[str] | None,
    typer.Option("--task", help="Certify what is written on this task, as `lorakit certify`; may be repeated."),
]
Margin = Annotated[
    float | None, typer.Option(help="How much worse it may be, in the units of the scores.", show_default=False)
]
Alpha = Annotated[float | None, typer.Option(help="Level of each one-sided bound; default: 0.05.", show_default=False)]
Guard = Annotated[list[str] | None, typer.Option("--guard", help="More tasks on which it must not be worse.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")]
Cache = Annotated[str | None, typer.Option(help="A directory that keeps scores for later calls.")]


@dataclass(frozen=True)
class Certification:
    """The options about tasks, as they were given."""

    task: list[str] | None
    margin: float | None
    alpha: float | None
    guard: list[str] | None
    limit: int | None
    cache: str | None

    def asked(self, base: str | None, *, only: Mapping[str, Any] | None = None, smallest: str | None = None) -> bool:
        """Whether a certificate is asked for.

        `smallest` is the option that asks for the smallest adapter, where it was given; `only` are more options that do
        nothing without a task.
        Raises: typer.BadParameter for options that are missing, and for those that would do nothing.
        """
        if smallest is not None or self.task:
            needed = {"--base": base, "--task": self.task, "--margin": self.margin}
            missing = [option for option, value in needed.items() if value is None or value == []]
            if missing:
                raise typer.BadParameter(f"is needed with {smallest or '--task'}.", param_hint=", ".join(missing))
            return True
        own = {"--margin": self.margin, "--alpha": self.alpha, "--guard": self.guard, "--limit": self.limit}
        idle = [option for option, value in {**own, "--cache": self.cache, **(only or {})}.items() if _given(value)]
        if idle:
            raise typer.BadParameter("does nothing without --task.", param_hint=", ".join(idle))
        return False

    def settings(self, options: LoadOptions, **more: Any) -> dict[str, Any]:
        """The arguments of `lorakit.evaluation.write_certified`, with `more` of them."""
        return {
            **more,
            "tasks": self.task,
            "margin": self.margin,
            "alpha": 0.05 if self.alpha is None else self.alpha,
            "guards": self.guard or (),
            "limit": self.limit,
            "cache": self.cache,
            "options": options,
        }


def loading(
    device: str | None, dtype: str, load_in_4bit: bool, revision: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """The options about loading a model that were given, by name."""
    return {
        "--device": device,
        "--dtype": None if dtype == "auto" else dtype,
        "--load-in-4bit": load_in_4bit,
        "--revision": revision,
        "--trust-remote-code": trust_remote_code,
    }


def refuse_without_base(base: str | None, given: Mapping[str, Any]) -> None:
    """A usage error for options about loading a model, where none is loaded."""
    if base is not None:
        return
    idle = [option for option, value in given.items() if _given(value)]
    if idle:
        raise typer.BadParameter("does nothing without --base.", param_hint=", ".join(idle))


def with_certificate(report: Report, certificate: Certificate | None) -> dict[str, Any]:
    """A report as JSON data, with its certificate under "certificate"."""
    return report.to_dict() | ({} if certificate is None else {"certificate": certificate.to_dict()})


def finish(certificate: Certificate | None, *, as_json: bool) -> None:
    """Print before and after, and exit with the verdict's code, where there is a certificate."""
    if certificate is None:
        return
    if not as_json:
        lines = ("Before and after:", *(f"  {line}" for line in certificate.details))
        print_lines(certificate.headline, *lines, *certificate.next_steps)
    raise typer.Exit(EXIT_CODES[certificate.verdict])


def _given(value: Any) -> bool:
    return value is not None and value is not False and value != []
