"""The smallest rank at which a task survives, on a ladder that is fixed beforehand. For compress and export."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import size
from lorakit._report import Report, Table
from lorakit.compress._heal import Healed
from lorakit.evaluation import Certificate
from lorakit.evaluation._written import place
from lorakit.evaluation.comparison import Comparison
from lorakit.serving._written import WrittenReport
from lorakit.statistics import Verdict, fixed_sequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ranks, the same for all modules; those below the adapter's own are tested.
LADDER = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class SmallestStep:
    """One rank that was tested: what the adapter has at it, and the certificate.

    `healed` says what healing did before the adapter was scored; None without. `energy_kept` is that of the cut.
    """

    rank: int
    parameters: int
    size_bytes: int
    energy_kept: float
    certificate: Certificate
    healed: Healed | None = None

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
        """The certificate's tasks, and what healing did."""
        step = next(step for step in self.steps if step.rank == (self.rank or step.rank))
        if step.healed is None:
            return self.certificate.details
        told = f"healed in {step.healed.steps} steps: KL from the original {_divergences(step)} nats a token"
        return (*self.certificate.details, f"{told}, on the texts it learned from")

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
        if any(step.healed is not None for step in self.steps):
            columns.insert(3, ("KL, healed", _divergences))
        note = f"From large to small, until one does not PASS. Bounds are one-sided, each at level {self.alpha:g}."
        return [Table.of("", columns, self.steps, note=note)]

    def rows(self) -> list[dict[str, Any]]:
        """One row a rank and task."""
        return [
            {
                "rank": step.rank,
                "size_bytes": step.size_bytes,
                "energy_kept": step.energy_kept,
                "kl_before": None if step.healed is None else step.healed.kl_before,
                "kl_after": None if step.healed is None else step.healed.kl_after,
                **row,
            }
            for step in self.steps
            for row in step.certificate.rows()
        ]

    def plot(self) -> Figure:
        """The difference of each rank with its bounds, on the task nearest its margin."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        for i, step in enumerate(self.steps):
            found = step.certificate
            error = [[found.difference - found.lower], [found.upper - found.difference]]
            axes.errorbar([i], [found.difference], yerr=error, fmt="o", capsize=4, color=f"C{i}")
            axes.plot([i], [-found.margin], "_", markersize=20, color="black")
        axes.axhline(0, color="gray", linewidth=1)
        axes.set_xticks(range(len(self.steps)), [f"{step.rank}\n{step.verdict}" for step in self.steps])
        axes.set(xlabel="rank", ylabel="difference; the bar is the margin", title=escape_mathtext(self.source))
        return figure


def _divergences(step: SmallestStep) -> str:
    return "" if step.healed is None else f"{step.healed.kl_before:.4g} → {step.healed.kl_after:.4g}"


@dataclass(frozen=True)
class Rung:
    """An adapter that was written at one rank, the share of its energy that the cut kept, and what healing did."""

    report: WrittenReport
    energy_kept: float
    healed: Healed | None = None


def descend(
    adapter: Any,
    out: str | os.PathLike[str],
    ladder: Sequence[int],
    write: Callable[[str, int], Rung],
    comparison: Comparison,
    source: str,
) -> SmallestReport:
    """Test the ranks of `ladder` from large to small until one does not PASS, and write the last that did.

    `write` writes the adapter at a rank into a directory. `adapter` is the reference; reports call it `source`.
    """
    reference = comparison.score([adapter], [source])
    steps: list[SmallestStep] = []
    before: WrittenReport | None = None
    with tempfile.TemporaryDirectory() as directory:

        def test(rank: int) -> Verdict:
            nonlocal before
            rung = write(os.fspath(Path(directory, str(rank))), rank)
            before = rung.report
            name = f"{source} at rank {rank}" + ("" if rung.healed is None else ", healed")
            certificate = comparison.certificate([reference], comparison.score([before.path], names=[name]))
            sizes = (rank, before.parameters, before.size_bytes)
            steps.append(SmallestStep(*sizes, rung.energy_kept, certificate, rung.healed))
            return certificate.verdict

        rank = fixed_sequence(ladder, test).last_passing
        assert before is not None
        report = SmallestReport(
            source=source,
            path=None if rank is None else os.fspath(out),
            rank_before=before.rank_before,
            rank=rank,
            size_bytes_before=before.size_bytes_before,
            margin=comparison.question.margin,
            alpha=comparison.question.alpha,
            steps=tuple(steps),
        )
        if rank is not None:
            place(Path(directory, str(rank)), out, report.certificate)
    return report
