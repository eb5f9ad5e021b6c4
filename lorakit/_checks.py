"""Checks of arguments, and words for error messages."""

from __future__ import annotations

from collections.abc import Sequence


def preview(names: Sequence[str]) -> str:
    """The first two of many names."""
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
