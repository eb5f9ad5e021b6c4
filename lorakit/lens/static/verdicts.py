"""The verdict on two updates, from how much they share, whether they agree, and their sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["safe", "redundant", "conflicting", "imbalanced"]
VERDICTS: tuple[Verdict, ...] = ("safe", "redundant", "conflicting", "imbalanced")
Reason = Literal["apart", "aligned", "opposed", "contested", "uneven"]

_SIGNIFICANT = 3.0  # standard deviations of a cosine by chance


@dataclass(frozen=True)
class Thresholds:
    """Thresholds for each verdict, see `judge`. They are conventions, not predictions of accuracy.

    Raises: ValueError for a threshold outside its range.
    """

    conflicting_below: float = -0.3
    redundant_above: float = 0.5
    contested_above: float = 0.5
    imbalanced_above: float = 5.0

    def __post_init__(self) -> None:
        ranges = {
            "conflicting_below": (-1, 0),
            "redundant_above": (0, 1),
            "contested_above": (0, 1),
            "imbalanced_above": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}; got {value}.")


def judge(
    cosine: float, random_cosine: float, shared: float, sigma_ratio: float, thresholds: Thresholds
) -> tuple[Verdict, Reason]:
    """The verdict on two updates and its reason: the first of these that applies.

    1. conflicting, opposed: the cosine is below `conflicting_below`. The updates cancel in their sum.
    2. conflicting, contested: `shared` is above `contested_above`, yet the cosine is below −`conflicting_below`. The
       updates map the same inputs to the same outputs, but differently.
    3. imbalanced, uneven: `sigma_ratio` is above `imbalanced_above`. The smaller update is lost in an even sum.
    4. redundant, aligned: the cosine is above `redundant_above`. The sum is nearly one update, scaled up.
    5. safe, apart.

    For 1 and 4 the cosine must also be more than three standard deviations of chance away from 0.

    Args:
        random_cosine: the standard deviation of the cosine by chance.
        shared: the smaller of the output and input overlaps, each above chance as (x − chance) / (1 − chance).
        sigma_ratio: the larger over the smaller spectral norm.
    """
    significant = abs(cosine) > _SIGNIFICANT * random_cosine
    if significant and cosine < thresholds.conflicting_below:
        return "conflicting", "opposed"
    if shared > thresholds.contested_above and cosine < -thresholds.conflicting_below:
        return "conflicting", "contested"
    if sigma_ratio > thresholds.imbalanced_above:
        return "imbalanced", "uneven"
    if significant and cosine > thresholds.redundant_above:
        return "redundant", "aligned"
    return "safe", "apart"
