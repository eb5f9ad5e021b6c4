"""Matplotlib figures; matplotlib is imported when the first one is made."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

from lorakit._format import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME_LENGTH = 60


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """An empty figure of a size in inches. It opens no window and changes no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def message_figure(title: str, message: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = new_figure(6, 2)
    figure.suptitle(title, fontsize=10)
    figure.text(0.5, 0.4, message, ha="center", va="center")
    return figure


def png_bytes(figure: Figure, *, dpi: int = 120) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def escape_mathtext(text: str) -> str:
    """Text for matplotlib: `$` escaped, which would begin mathematics, and characters without a glyph."""
    return visible(text).replace("$", r"\$")


def title_name(path: str) -> str:
    """An adapter's or a model's path for a figure's title: escaped, and only the end of a long one."""
    return escape_mathtext(path if len(path) <= _NAME_LENGTH else f"…{path[1 - _NAME_LENGTH :]}")
