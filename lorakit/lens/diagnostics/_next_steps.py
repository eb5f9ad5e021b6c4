"""Shell commands that reports suggest."""

from __future__ import annotations

import shlex
from pathlib import Path


def on_disk(path: str) -> str | None:
    """The path of an adapter, quoted for a shell; None for an adapter in memory."""
    return shlex.quote(path) if Path(path).exists() else None


def beside(path: str, suffix: str) -> str:
    """A directory beside an adapter on disk, quoted for a shell."""
    place = Path(path).resolve()
    return shlex.quote(str(place.with_name(f"{place.stem if place.is_file() else place.name}{suffix}")))


def short_name(path: str) -> str:
    """The name of an adapter for titles: its directory, or the model and adapter in memory."""
    return Path(path).resolve().name if Path(path).exists() else path
