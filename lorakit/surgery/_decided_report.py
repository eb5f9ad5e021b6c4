"""What the reports of edits that are kept only if they pass have in common: undoing and saving the edit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit._report import Report
from lorakit.errors import SurgeryError
from lorakit.surgery._edit import Edit
from lorakit.surgery._report import as_plain


class DecidedReport(Report):
    """Base class of reports whose `edit` is in the adapter if it was kept, and None, with `reasons`, if not."""

    reasons: tuple[str, ...]
    edit: Edit | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the edit itself, as JSON data."""
        data: dict[str, Any] = as_plain(self)
        return data

    def undo(self) -> None:
        """Take the edit out again, bit for bit. Raises: SurgeryError where it was not kept, or changed since."""
        self._edit("undone").undo()

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        previous: Sequence[Edit | Mapping[str, Any]] | None = None,
        source: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save the edited adapter; as `SurgeryReport.save`. Raises: SurgeryError where the edit was not kept."""
        self._edit("saved").save(directory, previous=previous, source=source, overwrite=overwrite)

    def _edit(self, done: str) -> Edit:
        if self.edit is None:
            raise SurgeryError(f"The edit was not kept, so there is nothing to be {done}: {self.reasons[0]}.")
        return self.edit
