"""Figures by matplotlib, which is imported when the first one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """An empty figure, of a size in inches; it opens no window and has no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def escape_mathtext(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
