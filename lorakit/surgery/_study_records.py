"""What a study has done so far: its calibration pass, and each edit's scores on each task."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from lorakit._files import make_file
from lorakit._records import Records
from lorakit.calibration.tally import Collected
from lorakit.errors import PlanError, raised_as
from lorakit.evaluation import Scores, Task
from lorakit.evaluation._digests import digest
from lorakit.evaluation._scores import read_scores

_Kept = tuple[Scores, float]


class StudyRecords:
    """Scores by edit and task, with the seconds that they took: in memory, and in a directory if one is given.

    `edits` are hashes of what each edit does, and `common` is what holds for all of them: with a task's fingerprint
    that is what a record is of. Raises: PlanError for records of other settings.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        edits: Collection[str],
        tasks: Sequence[Task],
        common: Mapping[str, Any],
    ) -> None:
        self._memory: dict[str, _Kept] = {}
        self._records: Records | None = None
        if directory is None:
            return
        settings = {
            _key(edit, task): {**common, "task": task.fingerprint(), "edit": edit} for edit in edits for task in tasks
        }
        self._records = Records(directory, settings)

    def read(self, edit: str, task: Task) -> _Kept | None:
        """An edit's scores on a task, or None."""
        key = _key(edit, task)
        if key not in self._memory and self._records is not None:
            record = self._records.read(key)
            if record is not None:
                self._memory[key] = read_scores(record["scores"]), float(record["seconds"])
        return self._memory.get(key)

    def write(self, edit: str, task: Task, scores: Scores, seconds: float, *, made_by: str) -> None:
        """Keep an edit's scores on a task; `made_by` says for readers which edit it is."""
        key = _key(edit, task)
        self._memory[key] = scores, seconds
        if self._records is not None:
            self._records.write(key, {"made_by": made_by, "scores": scores.to_dict(), "seconds": seconds})


class SavedPass:
    """A calibration pass in a file of a directory, whose name is a hash of all that the pass depends on."""

    def __init__(self, directory: str | os.PathLike[str], depends: Any) -> None:
        self.path = Path(directory, f"sensitivities-{digest(depends)[:16]}.safetensors")

    def read(self) -> Collected | None:
        """What the pass found; None if there is no file. Raises: PlanError for a file that cannot be read."""
        if not self.path.is_file():
            return None
        with (
            raised_as(PlanError, f"{str(self.path)!r} cannot be read. Remove it, and the pass runs again"),
            safe_open(self.path, framework="pt") as file,
        ):
            counts = {key: int(value) for key, value in file.metadata().items()}
            return Collected(statistics=[file.get_tensor(str(i)) for i in range(len(file.keys()))], **counts)

    def write(self, collected: Collected) -> None:
        tensors = {str(i): value.detach().cpu().contiguous() for i, value in enumerate(collected.statistics)}
        counts = {name: str(getattr(collected, name)) for name in ("num_examples", "num_without_labels")}
        make_file(self.path, lambda staging: save_file(tensors, staging, metadata=counts))


def _key(edit: str, task: Task) -> str:
    return f"{edit[:16]} on {task.name}"
