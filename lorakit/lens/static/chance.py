"""What random directions give."""

from __future__ import annotations

import math


def random_similarity(d: int) -> float:
    """Mean |cos| of two independent, uniformly random directions: Γ(d/2) / (√π Γ((d+1)/2)) ≈ √(2 / (π d))."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
