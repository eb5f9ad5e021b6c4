"""The record of surgery edits that is saved beside an edited adapter."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit._files import write_file
from lorakit.adapters.atomic import PICKLE_NAME, WEIGHTS_NAME

RECORD_NAME = "lorakit_surgery.json"


def read_edits(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The edits recorded beside the adapter in `directory`, oldest first; an empty list without a record.

    A record that cannot be read, or that belongs to other weights than those beside it, gives a RuntimeWarning and an
    empty list: what it says is not true of this adapter.
    """
    path = Path(directory, RECORD_NAME)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        return _ignored(path, f"it cannot be read: {error}")
    edits = record.get("edits") if isinstance(record, dict) else None
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        return _ignored(path, "it has no list of `edits`")
    if record.get("weights_sha256") != weights_hash(Path(directory)):
        return _ignored(path, "its `weights_sha256` is not that of the weights beside it, so they were replaced since")
    return edits


def write_edits(directory: str | os.PathLike[str], edits: Sequence[Mapping[str, Any]]) -> None:
    """Record `edits` (JSON data, oldest first) beside the adapter in `directory`; without edits, remove an old record.

    Write the weights first: the record holds their SHA-256, by which `read_edits` knows that it belongs to them.
    Raises: OSError where the record cannot be written.
    """
    path = Path(directory, RECORD_NAME)
    if not edits:
        path.unlink(missing_ok=True)
        return
    record = {"weights_sha256": weights_hash(Path(directory)), "edits": [dict(edit) for edit in edits]}
    write_file(path, json.dumps(record))


def _ignored(path: Path, reason: str) -> list[dict[str, Any]]:
    warnings.warn(f"The record of edits {str(path)!r} is ignored: {reason}.", RuntimeWarning, stacklevel=3)
    return []


def weights_hash(directory: Path) -> str | None:
    """SHA-256 of the adapter's weights; None where there are none."""
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (directory / name).is_file():
            with (directory / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None
