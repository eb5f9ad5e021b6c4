"""The smallest adapter whose task survives, on a ladder of ranks that is fixed beforehand."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._files import write_file
from lorakit._format import size
from lorakit._report import Report, Table
from lorakit.adapters import open_adapter
from lorakit.adapters.companions import check_overwrite
from lorakit.compress._truncate import truncate
from lorakit.errors import EvaluationError
from lorakit.evaluation import Certificate, LoadOptions
from lorakit.evaluation._comparison import Comparison, Hypothesis, Settings
from lorakit.evaluation._digests import adapter_digest
from lorakit.statistics import Verdict, fixed_sequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LADDER = (128, 64, 32, 16, 8, 4, 2, 1)  # ranks, the same for all modules; those below the adapter's own are tested
CERTIFICATE_NAME = "lorakit_certificate.json"


@dataclass(frozen=True)
class SmallestStep:
    """One rank that was tested: what the adapter has at it, and the certificate."""

    rank: int
    parameters: int
    size_bytes: int
    energy_kept: float
    certificate: Certificate

    @property
    def verdict(self) -> Verdict:
        """PASS, FAIL or INCONCLUSIVE."""
        return self.certificate.verdict


@dataclass(frozen=True, repr=False)
class SmallestReport(Report):
    """The ranks that were tested, from large to small; the last is the first that did not PASS, if any.

    `rank` and `path` are those of what was written, the last that PASSed; None where none did.
    """

    source: str
    path: str | None
    rank_before: int
    rank: int | None
    size_bytes_before: int
    margin: float
    alpha: float
    steps: tuple[SmallestStep, ...]

    @property
    def certificate(self) -> Certificate:
        """That of what was written; where nothing was, that of the first rank tested."""
        return next((step.certificate for step in self.steps if step.rank == self.rank), self.steps[0].certificate)

    @property
    def headline(self) -> str:
        """What was written, or why nothing was."""
        if self.rank is None:
            first = self.steps[0]
            return (
                f"Nothing is written: {self.source} at rank {first.rank} is {first.verdict} at margin {self.margin:g}, "
                f"and no smaller rank is tested after that."
            )
        written = next(step for step in self.steps if step.rank == self.rank)
        return (
            f"{self.source} → {self.path}: rank {self.rank_before} → {self.rank}, {size(self.size_bytes_before)} → "
            f"{size(written.size_bytes)}, the smallest of the ladder that PASSes at margin {self.margin:g}"
        )

    @property
    def details(self) -> tuple[str, ...]:
        """The certificate's tasks."""
        return self.certificate.details

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Where to serve it, or how many documents to score."""
        return self.certificate.next_steps if self.path is None else (f"lorakit servable {shlex.quote(self.path)}",)

    def tables(self) -> list[Table]:
        """One row a rank."""
        columns = [
            ("rank", lambda step: str(step.rank)),
            ("size", lambda step: size(step.size_bytes)),
            ("energy", lambda step: f"{step.energy_kept:.1%}"),
            ("task", lambda step: step.certificate.headline_task),
            ("difference", lambda step: f"{step.certificate.difference:+.4f}"),
            ("lower", lambda step: f"{step.certificate.lower:+.4f}"),
            ("upper", lambda step: f"{step.certificate.upper:+.4f}"),
            ("verdict", lambda step: step.verdict),
        ]
        note = f"From large to small, until one does not PASS. Bounds are one-sided, each at level {self.alpha:g}."
        return [Table.of("", columns, self.steps, note=note)]

    def rows(self) -> list[dict[str, Any]]:
        """One row a rank and task."""
        return [
            {"rank": step.rank, "size_bytes": step.size_bytes, "energy_kept": step.energy_kept, **row}
            for step in self.steps
            for row in step.certificate.rows()
        ]

    def plot(self) -> Figure:
        """The difference of each rank with its bounds, on the task nearest its margin."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        for place, step in enumerate(self.steps):
            found = step.certificate
            error = [[found.difference - found.lower], [found.upper - found.difference]]
            axes.errorbar([place], [found.difference], yerr=error, fmt="o", capsize=4, color=f"C{place}")
            axes.plot([place], [-found.margin], "_", markersize=20, color="black")
        axes.axhline(0, color="gray", linewidth=1)
        axes.set_xticks(range(len(self.steps)), [f"{step.rank}\n{step.verdict}" for step in self.steps])
        axes.set(xlabel="rank", ylabel="difference; the bar is the margin", title=escape_mathtext(self.source))
        return figure


def smallest(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: Any,
    tasks: Any,
    margin: float,
    alpha: float = 0.05,
    guards: Any = (),
    groups: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    used_documents: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> SmallestReport:
    """Write the adapter at the smallest rank at which it is as good as it was on every task, within a margin.

    The ranks 128, 64, 32, 16, 8, 4, 2 and 1 that lie below the adapter's are tested from large to small on the same
    documents, each at `alpha`, until one does not PASS: the probability that what is written is worse than the margin
    is then at most `alpha` (fixed-sequence testing). Each is `truncate(adapter, …, max_rank=rank)`. The certificate is
    written beside the adapter and into its model card. Where the largest rank does not PASS, nothing is written.

    Args:
        adapter: a directory, or a Hub id.
        out: a directory, made if need be; its adapter is replaced, and only if a rank PASSes.
        base, tasks, margin, alpha, guards, groups, tokenizer, limit, used_documents, cache, options, progress: as in
            `lorakit.evaluation.certify`.
        overwrite, verify: as in `truncate`.
    Raises: EvaluationError for an adapter of rank 1, and as `certify`; as `truncate`.
    Reference: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays:
        a-priori ordered hypotheses", 1995.

    Example:
        >>> import lorakit
        >>> task = lorakit.evaluation.choices("test.jsonl")  # doctest: +SKIP
        >>> lorakit.compress.smallest("adapter/", "small/", base="base/", tasks=task, margin=0.02)  # doctest: +SKIP
    """
    check_overwrite(out, [adapter], overwrite=overwrite)
    source = os.fspath(adapter)
    view = open_adapter(adapter)
    view.check()
    rank_before = max((module.rank for module in view.modules), default=0)
    ladder = [rank for rank in LADDER if rank < rank_before]
    if not ladder:
        raise EvaluationError(f"`adapter` must have a rank above 1; {source!r} has rank {rank_before}.")
    hypothesis = Hypothesis.of(tasks, guards, margin=margin, alpha=alpha, groups=groups)
    settings = Settings(limit=limit, used_documents=frozenset(used_documents), cache=cache, progress=progress)
    comparison = Comparison(base, hypothesis, settings, tokenizer=tokenizer, reference=adapter, options=options)
    reference = comparison.score([adapter])
    steps: list[SmallestStep] = []
    bytes_before = 0
    with tempfile.TemporaryDirectory() as directory:

        def test(rank: int) -> Verdict:
            nonlocal bytes_before
            report = truncate(adapter, Path(directory, str(rank)), max_rank=rank, verify=verify)
            candidate = comparison.score([report.path], names=[f"{source} at rank {rank}"])
            bytes_before = report.size_bytes_before
            certificate = comparison.certificate(reference, candidate)
            steps.append(SmallestStep(rank, report.parameters, report.size_bytes, report.energy_kept, certificate))
            return certificate.verdict

        rank = fixed_sequence(ladder, test).last_passing
    report = SmallestReport(
        source=source,
        path=None if rank is None else os.fspath(out),
        rank_before=rank_before,
        rank=rank,
        size_bytes_before=bytes_before,
        margin=margin,
        alpha=alpha,
        steps=tuple(steps),
    )
    if rank is not None:
        truncate(adapter, out, max_rank=rank, overwrite=overwrite, verify=verify)
        _add_certificate(Path(out), report.certificate)
    return report


def _add_certificate(out: Path, certificate: Certificate) -> None:
    """Write the certificate beside the adapter that it is of, and into its model card."""
    if adapter_digest(out) != certificate.hashes["candidate"][0]:
        raise EvaluationError(
            f"What is in {os.fspath(out)!r} is not the adapter that was tested. Did its source change?"
        )
    certificate.save(out / CERTIFICATE_NAME)
    card = out / "README.md"
    if card.exists():
        write_file(card, card.read_text(encoding="utf-8") + "\n" + certificate.to_model_card())
