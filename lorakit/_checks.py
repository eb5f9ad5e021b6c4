"""Checks of arguments, and words for error messages."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence


def check_integer(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """`value` as an integer of at least `least` (and at most `most`).

    Raises: ValueError, naming the argument, for anything else; True and False are no integers.
    """
    within = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if isinstance(value, int) and within and (most is None or value <= most):
        return value
    if most is not None:
        wanted = f"an integer from {least} to {most}"
    else:
        wanted = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
    raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")


def check_number(name: str, value: object, *, above: float = -math.inf, most: float = math.inf) -> float:
    """`value` as a finite float greater than `above` and at most `most`.

    Raises: ValueError, naming the argument, for anything else; True and False are no numbers.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(value, int | float) and number and above < value <= most:
        return float(value)
    if math.isinf(most):
        wanted = "a finite number" if math.isinf(above) else f"a finite number above {above:g}"
    else:
        wanted = f"a number in ({above:g}, {most:g}]"
    raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")


def check_seed(name: str, value: object) -> int:
    """`value`, an integer of any type, as a seed that torch takes.

    Raises: ValueError, naming the argument, for anything else.
    """
    try:
        seed = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        seed = -1
    if isinstance(value, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"`{name}` must be an integer from 0 to 2**63 - 1; got {value!r}.")
    return seed


def preview(names: Sequence[str]) -> str:
    """The first two of many names, for a message."""
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
