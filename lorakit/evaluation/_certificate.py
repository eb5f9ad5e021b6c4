"""A certificate: what was compared, on which documents, with what result, bound to hashes of all of it."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit._figures import escape_mathtext, new_figure
from lorakit._files import write_file
from lorakit._report import Report
from lorakit.errors import EvaluationError
from lorakit.evaluation._digests import digest
from lorakit.evaluation._scores import Scores, aligned
from lorakit.statistics import combine_tasks, paired_interval, seeds_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.statistics import Interval

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
FORMAT = "lorakit-certificate-1"


@dataclass(frozen=True)
class CertifiedTask:
    """One task of a certificate. Bounds are one-sided, each at the certificate's alpha.

    `reference_scores` and `candidate_scores` hold, for each seed, a score a document, in the order of `documents`.
    `groups` numbers the passage that each document belongs to, where several share one. `documents_needed` is None
    where more documents would not help.
    """

    name: str
    guard: bool
    margin: float
    verdict: Verdict
    difference: float
    lower: float
    upper: float
    n: int
    method: str
    candidate_only: int | None
    reference_only: int | None
    documents_needed: int | None
    worst_seed_difference: float | None
    reference_mean: float
    candidate_mean: float
    documents: tuple[str, ...]
    groups: tuple[int, ...] | None
    reference_scores: tuple[tuple[float, ...], ...]
    candidate_scores: tuple[tuple[float, ...], ...]
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        reference: Sequence[Scores],
        candidate: Sequence[Scores],
        *,
        margin: float,
        alpha: float,
        groups: Sequence[Any] | None = None,
        guard: bool = False,
    ) -> CertifiedTask:
        """The result of one task alone, from a `Scores` for each seed of either side.

        Raises: as `lorakit.evaluation.compare`.
        """
        first = reference[0]
        sides = [tuple(tuple(aligned(first, one)) for one in side) for side in (reference, candidate)]
        codes = None
        if groups is not None:
            interval_of(sides[0], sides[1], alpha, groups)  # checks them
            labels = groups.tolist() if hasattr(groups, "tolist") else list(groups)
            numbers: dict[Any, int] = {}
            codes = tuple(numbers.setdefault(label, len(numbers)) for label in labels)
        return _certified(first.task, guard, margin, alpha, first.documents, codes, sides, first.settings)

    def interval(self, alpha: float) -> Interval:
        """The interval of the scores."""
        return interval_of(self.reference_scores, self.candidate_scores, alpha, self.groups)

    def recomputed(self, alpha: float, verdict: Verdict) -> CertifiedTask:
        """The same, with every figure computed anew from the scores."""
        sides = [self.reference_scores, self.candidate_scores]
        again = _certified(self.name, self.guard, self.margin, alpha, self.documents, self.groups, sides, self.settings)
        return replace(again, verdict=verdict)


@dataclass(frozen=True, repr=False)
class Certificate(Report):
    """Whether the candidate is as good as the reference, within a margin that was fixed beforehand.

    `verdict` is PASS where every task's lower bound lies above −margin, FAIL where a task's upper bound lies below it
    (after Holm's adjustment), else INCONCLUSIVE. `difference`, `lower`, `upper` and `margin` are those of
    `headline_task`, the task nearest its margin. `sha256` is of everything else.
    """

    verdict: Verdict
    alpha: float
    margin: float
    difference: float
    lower: float
    upper: float
    documents_needed: int | None
    headline_task: str
    base: str
    reference: tuple[str, ...]
    candidate: tuple[str, ...]
    hashes: Mapping[str, Any]
    environment: Mapping[str, str]
    created: str
    tasks: tuple[CertifiedTask, ...]
    sha256: str = ""

    @property
    def headline(self) -> str:
        """The verdict, in a line."""
        candidate = ", ".join(self.candidate)
        level = f"{100 * (1 - self.alpha):g} %"
        return (
            f"{self.verdict}: {candidate} against {', '.join(self.reference)}, {self.headline_task} "
            f"{self.difference:+.4f} (lower {self.lower:+.4f}, upper {self.upper:+.4f}, one-sided {level}) at margin "
            f"{self.margin:g}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        """One line a task."""
        return tuple(
            f"{row.name}{' (guard)' if row.guard else ''}: {row.verdict}, {row.reference_mean:.4f} → "
            f"{row.candidate_mean:.4f} on {row.n} documents, difference {row.difference:+.4f} "
            f"[{row.lower:+.4f}, {row.upper:+.4f}], margin {row.margin:g}"
            for row in self.tasks
        )

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do with this verdict."""
        n = next(row.n for row in self.tasks if row.name == self.headline_task)
        if self.verdict == "INCONCLUSIVE" and self.documents_needed is not None and self.documents_needed > n:
            return (f"# score {self.documents_needed} documents of {self.headline_task} for a verdict at this margin",)
        return ()

    def rows(self) -> list[dict[str, Any]]:
        """One row a task, without the documents' scores."""
        left_out = {"documents", "groups", "reference_scores", "candidate_scores", "settings"}
        return [{k: v for k, v in row.items() if k not in left_out} for row in self.to_dict()["tasks"]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate as JSON, whole or not at all."""
        write_file(path, json.dumps({"format": FORMAT, **self.to_dict()}, indent=1, allow_nan=False))

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The certificate as one HTML page; written to `path` where one is given."""
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Certificate</title><style>'
            "body{font:15px/1.5 system-ui,sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
            "td,th{border:1px solid #ccc;padding:.2em .5em;text-align:right}</style></head><body>"
            f"<h1>{html.escape(self.verdict)}</h1>{self._repr_html_()}"
            f"<p>Certificate {html.escape(self.sha256)}, {html.escape(self.created)}.</p></body></html>"
        )
        if path is not None:
            write_file(path, page)
        return page

    def to_model_card(self) -> str:
        """A section for a model card, in Markdown."""
        lines = ["## Did the task survive?", "", self.headline, ""]
        lines += ["| task | reference | this adapter | difference | lower | upper | margin | documents | verdict |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row.name} | {row.reference_mean:.4f} | {row.candidate_mean:.4f} | {row.difference:+.4f} | "
            f"{row.lower:+.4f} | {row.upper:+.4f} | {row.margin:g} | {row.n} | {row.verdict} |"
            for row in self.tasks
        ]
        lines += ["", f"Bounds are one-sided, each at level {self.alpha:g}. Certificate SHA-256 `{self.sha256}`.", ""]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Each task's difference with its bounds, beside its margin."""
        figure = new_figure(8, 1.5 + 0.5 * len(self.tasks))
        axes = figure.subplots()
        places = range(len(self.tasks))
        for place, row in zip(places, self.tasks, strict=True):
            error = [[row.difference - row.lower], [row.upper - row.difference]]
            axes.errorbar([row.difference], [place], xerr=error, fmt="o", capsize=4, color=f"C{place}")
            axes.plot([-row.margin], [place], "|", markersize=16, color="black")
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_yticks(list(places), [escape_mathtext(row.name) for row in self.tasks])
        axes.invert_yaxis()
        axes.set(xlabel="candidate − reference; the bar is the margin")
        axes.set_title(escape_mathtext(f"{self.verdict}: {', '.join(self.candidate)}"))
        return figure

    def verify(self) -> None:
        """Compute the hash and every figure anew from the scores in the certificate.

        Raises: EvaluationError where one of them is not what the certificate says.
        """
        stated = self.to_dict()
        if digest({k: v for k, v in stated.items() if k != "sha256"}) != self.sha256:
            raise EvaluationError("The certificate does not verify: its content is not what its SHA-256 says.")
        intervals = {row.name: row.interval(self.alpha) for row in self.tasks}
        combined = combine_tasks(intervals, {row.name: row.margin for row in self.tasks})
        if combined.verdict != self.verdict:
            raise EvaluationError(
                f"The certificate does not verify: its scores give {combined.verdict}, it says {self.verdict}."
            )
        for row in self.tasks:
            again = row.recomputed(self.alpha, combined.verdicts[row.name])
            wrong = [f.name for f in fields(row) if not _same(getattr(row, f.name), getattr(again, f.name))]
            if wrong:
                raise EvaluationError(
                    f"The certificate does not verify: {row.name}'s {', '.join(wrong)} are not those of its scores."
                )
        headline = next(row for row in self.tasks if row.name == combined.headline)
        for name in ("margin", "difference", "lower", "upper", "documents_needed"):
            if self.headline_task != headline.name or getattr(self, name) != getattr(headline, name):
                raise EvaluationError(f"The certificate does not verify: its {name} is not that of {headline.name}.")


def _same(a: Any, b: Any) -> bool:
    """Whether two figures are the same but for another machine's rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return bool(a == b)


def _certified(
    name: str,
    guard: bool,
    margin: float,
    alpha: float,
    documents: tuple[str, ...],
    groups: tuple[int, ...] | None,
    sides: Sequence[tuple[tuple[float, ...], ...]],
    settings: Mapping[str, Any],
) -> CertifiedTask:
    reference, candidate = sides
    interval = interval_of(reference, candidate, alpha, groups)
    return CertifiedTask(
        name=name,
        guard=guard,
        margin=margin,
        verdict=interval.verdict(margin),
        difference=interval.difference,
        lower=interval.lower,
        upper=interval.upper,
        n=len(documents),
        method=interval.method,
        candidate_only=getattr(interval, "candidate_only", None),
        reference_only=getattr(interval, "reference_only", None),
        documents_needed=interval.documents_needed(margin),
        worst_seed_difference=getattr(interval, "worst_seed_difference", None),
        reference_mean=_mean(reference),
        candidate_mean=_mean(candidate),
        documents=documents,
        groups=groups,
        reference_scores=reference,
        candidate_scores=candidate,
        settings=dict(settings),
    )


def _mean(scores: Sequence[Sequence[float]]) -> float:
    return math.fsum(math.fsum(one) / len(one) for one in scores) / len(scores)


def interval_of(
    reference: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], alpha: float, groups: Any = None
) -> Interval:
    """The interval of one seed a side, or of several, paired by seed.

    Raises: EvaluationError for two seeds, or different numbers of seeds on the two sides.
    """
    if len(reference) != len(candidate):
        raise EvaluationError(
            f"Both sides must have the same seeds; the reference has {len(reference)}, the candidate {len(candidate)}."
        )
    if len(reference) == 1:
        return paired_interval(reference[0], candidate[0], alpha=alpha, groups=groups)
    return seeds_interval(reference, candidate, alpha=alpha, groups=groups)


def read_certificate(path: str | os.PathLike[str]) -> Certificate:
    """A certificate from its JSON; not verified.

    Raises: EvaluationError where the file is none.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        tasks = tuple(
            CertifiedTask(
                **{
                    **row,
                    "documents": tuple(row["documents"]),
                    "groups": None if row["groups"] is None else tuple(row["groups"]),
                    "reference_scores": tuple(map(tuple, row["reference_scores"])),
                    "candidate_scores": tuple(map(tuple, row["candidate_scores"])),
                }
            )
            for row in content.pop("tasks")
        )
        sides: dict[str, Any] = {side: tuple(content.pop(side)) for side in ("reference", "candidate")}
        return Certificate(**content, **sides, tasks=tasks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{os.fspath(path)!r} is not a certificate of lorakit's: {error}.") from error
