"""Checks of what callers pass in: scores, groups, levels, margins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import EvaluationError

Floats = NDArray[np.float64]

_SHAPES = {1: "one number a document (n,)", 2: "seeds × documents (S, n)"}


def as_scores(name: str, values: Any, *, ndim: int = 1) -> Floats:
    """Scores as a finite float64 array of `ndim` dimensions; `name` is the argument's name in messages."""
    wanted = f"`{name}` must be {_SHAPES[ndim]}"
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise EvaluationError(f"{wanted}; it cannot be made a numpy array: {error}") from error
    if array.ndim != ndim or array.size == 0:
        raise EvaluationError(f"{wanted}, at least one; got shape {array.shape} from {type(values).__name__}.")
    if array.dtype.kind not in "biuf":
        raise EvaluationError(f"{wanted}, real numbers or booleans; got dtype {array.dtype}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        where = f"document {bad[0]}" if ndim == 1 else f"seed {bad[0]}, document {bad[1]}"
        raise EvaluationError(
            f"`{name}` must be finite; got {array[bad]} for {where}. Find out why it has no score, or leave it out of "
            "both sides."
        )
    return array


def as_pair(reference: Any, candidate: Any, *, ndim: int = 1) -> tuple[Floats, Floats]:
    """`reference_scores` and `candidate_scores` of one shape."""
    first = as_scores("reference_scores", reference, ndim=ndim)
    second = as_scores("candidate_scores", candidate, ndim=ndim)
    if first.shape != second.shape:
        raise EvaluationError(
            "`reference_scores` and `candidate_scores` must have the same documents in the same order"
            f"{' and as many seeds' if ndim == 2 else ''}; got shapes {first.shape} and {second.shape}."
        )
    return first, second


def differences(reference: Floats, candidate: Floats) -> Floats:
    """Candidate − reference."""
    with np.errstate(over="ignore"):
        result = candidate - reference
    if not np.isfinite(result).all():
        raise EvaluationError("`candidate_scores` − `reference_scores` must be finite; it overflows. Rescale both.")
    return result


def is_binary(*arrays: Floats) -> bool:
    """Whether every score is exactly 0 or 1."""
    return all(bool(((array == 0) | (array == 1)).all()) for array in arrays)


def as_groups(groups: Any, n: int) -> NDArray[np.intp]:
    """Each document's group as a number from 0 on; at least two groups."""
    labels: list[Any]
    if hasattr(groups, "tolist"):  # numpy, torch, pandas: the elements, comparable by value
        labels = groups.tolist()
    elif isinstance(groups, Iterable):
        labels = list(groups)
    else:
        labels = [groups]
    if not isinstance(labels, list) or len(labels) != n:
        got = len(labels) if isinstance(labels, list) else "a single label"
        raise EvaluationError(f"`groups` must have one label a document ({n}); got {got}.")
    numbers: dict[Any, int] = {}
    try:
        codes = [numbers.setdefault(label, len(numbers)) for label in labels]
    except TypeError as error:
        raise EvaluationError(f"`groups` must have hashable labels, such as strings or integers: {error}.") from error
    if any(label != label for label in numbers):
        raise EvaluationError("`groups` must name a group for every document; got NaN.")
    if len(numbers) < 2:
        raise EvaluationError(
            f"`groups` must name at least 2 groups; all {n} documents are in {labels[0]!r}. One group says nothing "
            "about the spread between groups."
        )
    return np.asarray(codes, dtype=np.intp)


def as_number(name: str, value: Any) -> float:
    """A real number, not NaN."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real) or math.isnan(value):
        raise EvaluationError(f"`{name}` must be a number; got {value!r}.")
    return float(value)


def as_alpha(alpha: Any) -> float:
    """The level of each one-sided bound, in (0, 0.5]."""
    value = as_number("alpha", alpha)
    if not 0 < value <= 0.5:
        raise EvaluationError(
            f"`alpha` must be in (0, 0.5], the level of each one-sided bound; got {alpha!r}. 0.05 is customary."
        )
    return value


def as_margin(margin: Any, name: str = "margin") -> float:
    """A margin: positive and finite."""
    value = as_number(name, margin)
    if not 0 < value < math.inf:
        raise EvaluationError(
            f"`{name}` must be positive and finite, the largest loss that is still acceptable, in the score's units; "
            f"got {margin!r}."
        )
    return value


def as_power(power: Any) -> float:
    """The probability of a PASS that is asked for, in [0.5, 1)."""
    value = as_number("power", power)
    if not 0.5 <= value < 1:
        raise EvaluationError(f"`power` must be in [0.5, 1); got {power!r}.")
    return value
