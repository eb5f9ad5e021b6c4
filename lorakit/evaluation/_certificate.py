"""A certificate: what was compared, on which documents, with what result, bound to hashes of all of it."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._files import write_file
from lorakit._report import Report
from lorakit.adapters.companions import CERTIFICATE_END, CERTIFICATE_NAME, certificate_start
from lorakit.errors import EvaluationError
from lorakit.evaluation._certified_task import CertifiedTask
from lorakit.evaluation._digests import adapter_digest, digest
from lorakit.statistics import Verdict, combine_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "lorakit-certificate-1"


@dataclass(frozen=True, repr=False)
class Certificate(Report):
    """Whether the candidate is as good as the reference, within a margin that was fixed beforehand.

    `verdict` is PASS where every task's lower bound lies above −margin, FAIL where a task's upper bound lies below it
    (after Holm's adjustment), else INCONCLUSIVE. `difference`, `lower`, `upper` and `margin` are those of
    `headline_task`, the task nearest its margin. `sha256` is of everything else.

    `reference` and `candidate` name the seeds of either side. Where a candidate was certified against several adapters,
    as a merge is, `reference` names these, and each task is there once for each of them. `policy_tolerance` is that of
    Gradience's policy, where it was asked for.
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
    policy_tolerance: float | None = None
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
        return tuple(row.line for row in self.tasks)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do with this verdict."""
        n = next(row.n for row in self.tasks if row.name == self.headline_task)
        if self.verdict == "INCONCLUSIVE" and self.documents_needed is not None and self.documents_needed > n:
            return (f"# score {self.documents_needed} documents of {self.headline_task} for a verdict at this margin",)
        return ()

    def rows(self) -> list[dict[str, Any]]:
        """One row a task, without the documents' scores."""
        left_out = {"documents", "groups", "labels", "reference_scores", "candidate_scores", "settings"}
        return [{k: v for k, v in row.items() if k not in left_out} for row in self.to_dict()["tasks"]]

    def to_json(self) -> str:
        """The certificate as JSON, always the same text."""
        return json.dumps({"format": FORMAT, **self.to_dict()}, indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate as JSON, whole or not at all."""
        write_file(path, self.to_json())

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
        """A section for a model card, in Markdown, between marks by which lorakit finds it again."""
        lines = [certificate_start(self.sha256), "", "## Did the task survive?", "", _in_line(self.headline), ""]
        lines += ["| task | reference | this adapter | difference | lower | upper | margin | documents | verdict |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {_in_line(row.name)} | {row.reference_mean:.4f} | {row.candidate_mean:.4f} | {row.difference:+.4f} | "
            f"{row.lower:+.4f} | {row.upper:+.4f} | {row.margin:g} | {row.n} | {row.verdict} |"
            for row in self.tasks
        ]
        lines += ["", f"Bounds are one-sided, each at level {self.alpha:g}. Certificate SHA-256 `{self.sha256}`."]
        lines += [f"The scores are in `{CERTIFICATE_NAME}`: `lorakit certify --verify {CERTIFICATE_NAME}`.", ""]
        return "\n".join([*lines, CERTIFICATE_END, ""])

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
            again = replace(row.certified(self.alpha, self.policy_tolerance), verdict=combined.verdicts[row.name])
            wrong = [f.name for f in fields(row) if not _same(getattr(row, f.name), getattr(again, f.name))]
            if wrong:
                raise EvaluationError(
                    f"The certificate does not verify: {row.name}'s {', '.join(wrong)} are not those of its scores."
                )
        headline = next(row for row in self.tasks if row.name == combined.headline)
        for name in ("margin", "difference", "lower", "upper", "documents_needed"):
            if self.headline_task != headline.name or getattr(self, name) != getattr(headline, name):
                raise EvaluationError(f"The certificate does not verify: its {name} is not that of {headline.name}.")

    def check_candidate(self, directory: str | os.PathLike[str]) -> None:
        """Raise EvaluationError unless the adapter in `directory` is what this certificate is of."""
        found = adapter_digest(directory)
        if found not in self.hashes["candidate"]:
            raise EvaluationError(
                f"The certificate is not of the adapter in {os.fspath(directory)!r}: its candidate has the hash "
                f"{', '.join(self.hashes['candidate'])}, the adapter {found}. Certify this adapter."
            )


def _in_line(text: str) -> str:
    """Text for a cell of a Markdown table: without HTML, line ends and bars."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _same(a: Any, b: Any) -> bool:
    """Whether two figures are the same but for another machine's rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return bool(a == b)


def read_certificate(path: str | os.PathLike[str]) -> Certificate:
    """A certificate from its JSON, or from that in an adapter's directory; not verified.

    Raises: EvaluationError where the file is none, or is not written as lorakit writes certificates.
    """
    file = Path(path, CERTIFICATE_NAME) if Path(path).is_dir() else Path(path)
    try:
        text = file.read_bytes().decode("utf-8")
        content = json.loads(text)
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        tasks = tuple(
            CertifiedTask(**{name: _as_written(name, v) for name, v in t.items()}) for t in content.pop("tasks")
        )
        sides: dict[str, Any] = {side: tuple(content.pop(side)) for side in ("reference", "candidate")}
        certificate = Certificate(**content, **sides, tasks=tasks)
        changed = certificate.to_json() != text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{os.fspath(file)!r} is not a certificate of lorakit's: {error}.") from error
    if changed:
        raise EvaluationError(f"{os.fspath(file)!r} is not a certificate of lorakit's: its text was changed.")
    return certificate


def _as_written(name: str, value: Any) -> Any:
    """A field of a task, with tuples for lists."""
    if name in ("reference_scores", "candidate_scores"):
        return tuple(map(tuple, value))
    return tuple(value) if name in ("documents", "groups", "labels") and value is not None else value
