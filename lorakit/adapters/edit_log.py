"""The record of edits that lies beside an edited adapter on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lorakit.adapters.atomic import WEIGHTS_NAME

RECORD_NAME = "lorakit_surgery.json"
_ATTRIBUTE = "_lorakit_edits"


def edits_of(config: object) -> list[dict[str, Any]]:
    """The edits that an adapter's config in memory carries, oldest first."""
    return list(vars(config).get(_ATTRIBUTE, []))


def set_edits(config: object, edits: list[dict[str, Any]]) -> None:
    """Have `config`, an adapter's config in memory, carry `edits`: plain data only."""
    vars(config)[_ATTRIBUTE] = edits


def read_edits(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The edits recorded beside the adapter in `directory`; none where there is no record that can be read."""
    try:
        edits = json.loads(Path(directory, RECORD_NAME).read_bytes())["edits"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return edits if isinstance(edits, list) else []


def write_record(directory: str | os.PathLike[str], config: object) -> None:
    """Write the edits that `config` carries beside the adapter in `directory`; take an old record away if none.

    `weights_sha256` is that of the adapter's weights, where these are there: it says which weights the record is of.
    """
    path = Path(directory, RECORD_NAME)
    edits = edits_of(config)
    if not edits:
        path.unlink(missing_ok=True)
        return
    weights = Path(directory, WEIGHTS_NAME)
    digest = None
    if weights.exists():
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    partial = path.with_name(f".{RECORD_NAME}.{os.getpid()}")
    partial.write_text(json.dumps({"weights_sha256": digest, "edits": edits}))
    partial.replace(path)
