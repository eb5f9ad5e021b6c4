"""Numbers and names as text, for terminals, HTML and figures."""

from __future__ import annotations


def visible(text: str) -> str:
    r"""Text with what a terminal acts on (control characters, newlines, changes of direction) written as escapes.

    Names from adapters and configs are printed through this, so that they cannot move the cursor or fake a line.

    Example:
        >>> visible("q_proj\n\x1b[2J")
        'q_proj\\n\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float | None) -> str:
    """Three significant digits; empty for None."""
    return "" if value is None else f"{value:.3g}"


def count(value: float) -> str:
    """A count with three significant digits, in thousands (k), millions (M) or billions (G).

    Example:
        >>> count(999_552), count(2_488_320), count(640)
        ('1M', '2.49M', '640')
    """
    value = float(f"{value:.3g}")
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def size(number_of_bytes: float) -> str:
    """A size in bytes, with decimal prefixes: 2,488,320 is 2.49 MB.

    Example:
        >>> size(2_488_320), size(640)
        ('2.49 MB', '640 B')
    """
    text = count(number_of_bytes)
    digits, prefix = (text[:-1], text[-1]) if text[-1] in "GMk" else (text, "")
    return f"{digits} {prefix}B"


def share(value: float | None) -> str:
    """A fraction as a percentage; empty for None."""
    return "" if value is None else f"{100 * value:.0f}%"


def extent(pair: tuple[int, int] | None) -> str:
    """A range of integers, or a single one; empty for None.

    Example:
        >>> extent((4, 16)), extent((8, 8)), extent(None)
        ('4–16', '8', '')
    """
    return "" if pair is None else str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}–{pair[1]}"
