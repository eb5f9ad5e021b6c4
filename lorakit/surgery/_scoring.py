"""Scoring an adapter in place under edits that are taken out again."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm

from lorakit._signals import restoring
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import activated
from lorakit.evaluation import Scores, evaluate, function, loss
from lorakit.evaluation._task_kinds import Task
from lorakit.evaluation.comparison import Question
from lorakit.surgery._edit import Backup, exchange


@restoring
def edited(backups: Sequence[Backup]) -> Iterator[None]:
    """The factors as an edit has them, until the block ends; then bit for bit as they were."""
    exchange(backups)
    try:
        yield
    finally:
        exchange(backups, undo=True)


@dataclass(eq=False)
class Scoring:
    """Scores of an adapter in its model, one call after the other, with the time that they take."""

    adapter: PeftModel
    adapter_name: str
    question: Question
    tokenizer: Any
    source: str | None = None  # where the adapter was loaded from
    seconds: dict[str, float] = field(default_factory=dict)  # of the last time that a task was scored, by its name
    spent: float = 0.0

    def __call__(self, tasks: Sequence[Task], backups: Sequence[Backup] = ()) -> dict[str, Scores]:
        """Scores by task, with an edit if given. Raises: EvaluationError for documents that were used before."""
        found: dict[str, Scores] = {}
        with activated(self.adapter, self.adapter_name), edited(backups):
            for task in tasks:
                started = time.perf_counter()
                limit = self.question.limit
                found |= evaluate(self.adapter, task, tokenizer=self.tokenizer, limit=limit, progress=False)
                self.seconds[task.name] = time.perf_counter() - started
                self.spent += self.seconds[task.name]
        self.question.check_unused(found)
        return found


def selection_task(batches: Sequence[Any], loss_fn: LossFn | None) -> Task:
    """Minus the loss of each example, which chooses among edits."""
    if loss_fn is None:
        return loss(batches, name="selection")

    def negative(model: Any) -> list[float]:
        return [-value for batch in batches for value in loss_fn(model, batch).tolist()]

    return function(negative, name="selection")


def bar_of(total: int, seconds: float, *, progress: bool) -> Any:
    """A progress bar in scorings; how long they will take is said first."""
    if progress:
        tqdm.write(f"{total} scorings, about {_duration(seconds)}", file=sys.stderr)
    return tqdm(total=total, desc="scoring", unit="scoring", disable=not progress)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def unused(question: Question, documents: Sequence[str]) -> Question:
    """The question, with more documents that no verdict may rest on."""
    return replace(question, used_documents=[*question.used_documents, *documents])
