"""A bench's stages: plans of which each needs the results of the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorakit._report import Report
from lorakit.experiments._plan import Shard, Trial, read_shard, run_plan
from lorakit.experiments._signed_report import SignedReport

AnyReport = TypeVar("AnyReport", bound=SignedReport)


@dataclass(frozen=True, repr=False)
class UnfinishedBench(Report):
    """A shard has done its part of a stage, and other shards have not yet recorded theirs."""

    directory: str
    stage: str
    finished: int
    missing: tuple[str, ...]
    shards: tuple[str, ...]

    verdict = "INCONCLUSIVE"

    @property
    def headline(self) -> str:
        """What is missing, in a line."""
        total = self.finished + len(self.missing)
        return (
            f"Not finished: {self.finished} of {total} trials of the stage {self.stage!r} have a record; missing are "
            f"{', '.join(self.missing[:5])}{' …' if len(self.missing) > 5 else ''}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        """Which shards go on."""
        return (f"they belong to the shards {', '.join(self.shards)}; then every shard goes on by the same call",)

    def rows(self) -> list[dict[str, Any]]:
        """One row a missing trial."""
        return [{"stage": self.stage, "trial": key} for key in self.missing]


class MissingTrialsError(Exception):
    """Other shards have not recorded their part of a stage; `report` says which."""

    def __init__(self, report: UnfinishedBench) -> None:
        super().__init__(report.headline)
        self.report = report


def run_stage(
    name: str,
    plan: Sequence[Trial],
    directory: Path,
    *,
    executor: Executor | None,
    shard: Shard | None,
    progress: bool,
) -> Mapping[str, dict[str, Any]]:
    """The results of a stage's trials, whose records are in `directory`/records.

    Raises: MissingTrialsError where a shard waits for others; and as `lorakit.experiments.run_plan`.
    """
    results = run_plan(plan, directory / "records", executor=executor, shard=shard, progress=progress)
    if results.missing and shard is not None:
        raise MissingTrialsError(
            UnfinishedBench(
                directory=str(directory),
                stage=name,
                finished=len(results),
                missing=results.missing,
                shards=_shards(plan, results.missing, shard),
            )
        )
    return results


def finished(
    run: Callable[[], AnyReport], directory: Path, *, release: Callable[[], None]
) -> AnyReport | UnfinishedBench:
    """Run every stage and write the report; or say what other shards have not recorded yet. `release` ends it."""
    try:
        report = run()
    except MissingTrialsError as waiting:
        return waiting.report
    finally:
        release()
    report.save(directory)
    return report


def _shards(plan: Sequence[Trial], missing: Sequence[str], shard: Shard) -> tuple[str, ...]:
    """The shards, as "i/n", that the missing trials belong to."""
    n = read_shard(shard)[1]
    found = sorted({place % n + 1 for place, trial in enumerate(plan) if trial.key in missing})
    return tuple(f"{i}/{n}" for i in found)
