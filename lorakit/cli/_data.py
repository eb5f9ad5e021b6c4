"""Target modules and examples as the shell names them."""

from __future__ import annotations


def named_targets(text: str | None) -> str | list[str] | None:
    """Target modules as the shell has them: names with commas between, "all-linear", or None."""
    if text is None or text == "all-linear":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
