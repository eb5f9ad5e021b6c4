"""Figures by matplotlib (the extra `plots`), which is imported when the first one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lorakit.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """An empty figure, of a size in inches; no window, no global state.

    Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Plots need matplotlib: pip install lorakit[plots]") from error
    return Figure(figsize=(width, height), layout=layout)


def plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
