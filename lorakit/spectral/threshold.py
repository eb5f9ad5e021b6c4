"""The optimal hard threshold for singular values, with unknown noise.

Reference: Gavish & Donoho, "The Optimal Hard Threshold for Singular Values is 4/√3", IEEE Trans. Inf. Theory 2014.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lorakit._checks import check_number

_SQUARE = 2.8583624240688685  # ω(1), the one that audits need, without scipy


@functools.cache
def hard_threshold_coefficient(beta: float = 1.0) -> float:
    """ω(β), the optimal threshold in units of the median singular value of an m × n matrix, β = m / n <= 1.

    ω(β) = λ(β) / √μ(β), with μ(β) the median of the Marchenko–Pastur distribution (Eq. 11 and 25); ω(1) = 2.858.
    Raises: ValueError for β outside (0, 1].

    Example:
        >>> round(hard_threshold_coefficient(1.0), 3), round(hard_threshold_coefficient(0.5), 3)
        (2.858, 2.171)
    """
    check_number("beta", beta, above=0, most=1)
    return _SQUARE if beta == 1 else _coefficient(beta)


def _coefficient(beta: float) -> float:
    from scipy import integrate, optimize

    known_noise = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(angle: float) -> float:
        """The share of eigenvalues below low + (high − low) sin²; the substitution takes the density's peak away."""

        def density(phi: float) -> float:
            value = low + (high - low) * math.sin(phi) ** 2
            if value == 0:  # β = 1 and φ = 0, where the limit is finite
                return 4 / math.pi
            return ((high - low) * math.sin(phi) * math.cos(phi)) ** 2 / (math.pi * beta * value)

        return float(integrate.quad(density, 0, angle)[0])

    angle = float(optimize.brentq(lambda angle: below(angle) - 0.5, 0, math.pi / 2, xtol=1e-12))
    return known_noise / math.sqrt(low + (high - low) * math.sin(angle) ** 2)


def hard_threshold_rank(singular_values: Tensor, beta: float = 1.0) -> Tensor:
    """How many singular values (…, r) exceed ω(β) times their median: (…,), integers; 0 for an all-zero spectrum.

    It takes the values for those of a signal of low rank plus white noise whose values are more than half of them.
    """
    s = singular_values.to(torch.promote_types(singular_values.dtype, torch.float32))
    threshold = hard_threshold_coefficient(beta) * s.quantile(0.5, dim=-1, keepdim=True)
    return (s > threshold).sum(-1)
