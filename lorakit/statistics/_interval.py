"""What every interval has, and the arithmetic of t intervals with and without groups."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from lorakit.errors import EvaluationError
from lorakit.statistics._inputs import Floats, as_margin, as_number
from lorakit.statistics._verdict import Verdict, documents_needed, verdict

Alternative = Literal["greater", "less"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A paired difference, candidate − reference, with one-sided bounds.

    `lower` and `upper` are each at level `alpha`; together they are an interval at level 1 − 2·alpha. `n` counts
    documents. `degrees_of_freedom` is None where no t distribution is used.
    """

    difference: float
    lower: float
    upper: float
    alpha: float
    n: int
    method: str
    standard_error: float
    degrees_of_freedom: float | None

    def p_value(self, threshold: float, *, alternative: Alternative = "greater") -> float:
        """p-value of the one-sided test that the true difference is greater (or less) than `threshold`.

        The dual of the bounds: below `alpha` for "greater" where `lower` exceeds the threshold, and for "less" where
        `upper` lies below it.
        """
        value = as_number("threshold", threshold)
        if alternative not in ("greater", "less"):
            raise EvaluationError(f'`alternative` must be "greater" or "less"; got {alternative!r}.')
        return self._p_value(value, alternative)

    def _p_value(self, threshold: float, alternative: Alternative) -> float:
        distance = self.difference - threshold if alternative == "greater" else threshold - self.difference
        if self.standard_error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(special.stdtr(self.degrees_of_freedom, -distance / self.standard_error))

    def verdict(self, margin: float) -> Verdict:
        """PASS, FAIL or INCONCLUSIVE at this margin: see `verdict`."""
        return verdict(self.lower, self.upper, margin)

    def documents_needed(self, margin: float, *, power: float = 0.8) -> int | None:
        """Documents like these with which a candidate as good as the reference would PASS with probability `power`.

        None where no number of documents is enough, because the seeds alone vary too much.
        """
        return documents_needed(
            self.standard_error * math.sqrt(self.n),
            as_margin(margin),
            alpha=self.alpha,
            power=power,
            binary_documents=self.n if self._is_binary() else None,
        )

    def _is_binary(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's types."""
        return asdict(self)


def mean_and_error(d: Floats, groups: NDArray[np.intp] | None = None) -> tuple[float, float, int]:
    """Mean, its standard error, and the degrees of freedom: n − 1, or one less than there are groups.

    With groups: SE² = G/(G − 1) · Σ_g (Σ_{j in g} (d_j − mean))² / n².
    """
    scale = float(np.abs(d).max())
    if scale == 0:
        scale = 1.0
    scaled = d / scale  # squares neither overflow nor vanish, and equal differences have no spread
    mean = float(scaled.mean())
    residuals = scaled - mean
    sums = residuals if groups is None else np.bincount(groups, weights=residuals)
    count = sums.size
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / d.size
    return mean * scale, error * scale, count - 1


def t_bounds(difference: float, error: float, degrees_of_freedom: float, alpha: float) -> tuple[float, float]:
    """One-sided t bounds, each at level alpha."""
    if error == 0:
        return difference, difference
    reach = -float(special.stdtrit(degrees_of_freedom, alpha)) * error if alpha < 0.5 else 0.0
    return difference - reach, difference + reach
