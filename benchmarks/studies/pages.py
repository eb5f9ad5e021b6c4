"""The pages of the studies, docs/studies/*.md, from the records alone.

    python benchmarks/studies/write.py

Verdicts are in words. That A is better than B is "held" if the lower bound of A − B is above 0, "not held" if the upper
bound is below 0, and else "not decided". That A is as good as B at a margin is "held", "not held" or "not decided",
where a certificate would say PASS, FAIL or INCONCLUSIVE. All bounds are one-sided, each at level 0.05.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tools
from scipy.stats import bootstrap, spearmanr

from lorakit._figures import new_figure
from lorakit.statistics import Interval, seeds_interval

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "studies"
Row = dict[str, Any]
WORDS = {"PASS": "held", "FAIL": "not held", "INCONCLUSIVE": "not decided"}


@dataclass(frozen=True)
class Claim:
    """A row of the index: what a paper says, what came out here."""

    claim: str
    paper: str
    ours: str
    verdict: str
    documents: str
    seeds: str
    link: str


def records(study: str) -> dict[str, Row]:
    """The results of a study's trials by their keys; none where it has not been run."""
    found = (json.loads(file.read_text(encoding="utf-8")) for file in sorted((HERE / "records" / study).glob("*.json")))
    return {row["key"]: row["result"] for row in found if "result" in row}


def scores_of(record: Row, tasks: Iterable[str]) -> dict[str, float]:
    """One adapter's scores on some tasks, by document."""
    return {
        f"{task} {document}": score
        for task in tasks
        for document, score in zip(record[task]["documents"], record[task]["scores"], strict=True)
    }


def difference(reference: Sequence[Row], candidate: Sequence[Row], tasks: Sequence[str]) -> Interval:
    """Candidate − reference over the documents of some tasks, paired by seed and document."""
    sides = [[scores_of(record, tasks) for record in side] for side in (reference, candidate)]
    documents = list(sides[0][0])
    values = [[[scores[document] for document in documents] for scores in side] for side in sides]
    return seeds_interval(*values)


def best_rate(found: Mapping[str, Row], titles: Mapping[float, str]) -> float | None:
    """The learning rate whose training has the lowest validation loss; None where one is missing."""
    if not set(titles.values()) <= found.keys():
        return None
    return tools.best_rate({rate: found[title] for rate, title in titles.items()})


def rank_correlation(numbers: Any, outcomes: Any) -> tuple[float, float, float]:
    """Spearman's correlation over the columns of two (seeds, n), and its 90 % interval.

    It is the mean over seeds, since each seed may have a level of its own; the interval is of a percentile bootstrap
    over columns, each drawn with all its seeds.
    """
    pairs = np.stack([np.asarray(numbers, float), np.asarray(outcomes, float)], axis=1)

    def rho(chosen: Any) -> float:
        return float(np.mean([spearmanr(*pair[:, chosen.astype(int)]).statistic for pair in pairs]))

    columns = np.arange(pairs.shape[2])
    bounds = bootstrap(
        (columns,),
        rho,
        vectorized=False,
        n_resamples=2000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return rho(columns), float(bounds.low), float(bounds.high)


def better(found: Interval) -> str:
    """Whether the candidate is better than the reference."""
    return "held" if found.lower > 0 else "not held" if found.upper < 0 else "not decided"


def shown(found: Interval, scale: float = 1.0) -> str:
    """A difference with its bounds."""
    return bounds(found.difference, found.lower, found.upper, scale)


def bounds(difference: float, lower: float, upper: float, scale: float = 1.0) -> str:
    """Three numbers as a difference with its bounds."""
    digits = 1 if scale > 1 else 4
    difference, lower, upper = scale * difference, scale * lower, scale * upper
    return f"{difference:+.{digits}f} [{lower:+.{digits}f}, {upper:+.{digits}f}]"


def needed(found: Interval, margin: float) -> str:
    """What it would take to tell a difference as large as the margin from none."""
    documents = found.documents_needed(margin)
    return "more seeds" if documents is None else f"{documents:,} documents"


def both(score: str, loss: str) -> str:
    """A verdict by score, and by loss where that says something else."""
    return score if score == loss else f"{score} by score, {loss} by loss"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [list(headings), ["---"] * len(headings), *(list(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def template(name: str) -> str:
    """A page's text, without its tables."""
    return (HERE / "texts" / f"{name}.md").read_text(encoding="utf-8")


def save(name: str, text: str) -> None:
    """A page, or nothing where a study has no records yet."""
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text(text.strip() + "\n", encoding="utf-8")


def forest(path: Path, rows: Sequence[tuple[str, Interval]], label: str, scale: float = 1.0) -> None:
    """Differences with their bounds, one line each."""
    figure = new_figure(7, 0.6 + 0.35 * len(rows))
    axes = figure.subplots()
    for y, (_, found) in enumerate(rows):
        axes.plot([scale * found.lower, scale * found.upper], [y, y], color="tab:blue")
        axes.plot(scale * found.difference, y, "o", color="tab:blue")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
