"""What a curve of held-out loss over rank looks like, by a stated rule.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026: saturating, gradual and unstable curves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

Pattern = Literal["saturating", "gradual", "unstable"]
FLAT = 0.1  # the share of the whole improvement that a saturated curve's last step adds at most
ERRORS = 2.0  # how many standard errors a larger rank must be worse by, for the curve to be unstable


def pattern_of(
    losses: Sequence[float], stderr: Callable[[int, int], float | None], *, least: float = 0.0
) -> Pattern | None:
    """The pattern of mean held-out losses in increasing order of rank; None for fewer than three, or no errors.

    `stderr(i, j)` is the standard error of losses[i] − losses[j], paired. `least` is a difference that does not matter.
    Unstable: a larger rank is worse than a smaller one by more than 2 standard errors and more than `least`.
    Saturating: else, if the last step adds at most a tenth of the improvement from the first rank to the best, or at
    most `least`. Gradual: else. The rule does not depend on the losses' level, nor on their unit if `least` has it too.

    Example:
        >>> pattern_of([3.0, 2.0, 1.99], lambda i, j: 0.01), pattern_of([3.0, 2.0, 1.0], lambda i, j: 0.01)
        ('saturating', 'gradual')
    """
    if len(losses) < 3:
        return None
    for larger in range(len(losses)):
        for smaller in range(larger):
            error = stderr(larger, smaller)
            if error is None:
                return None
            if losses[larger] - losses[smaller] > max(ERRORS * error, least):
                return "unstable"
    whole = losses[0] - min(losses)
    return "saturating" if losses[-2] - losses[-1] <= max(FLAT * whole, least) else "gradual"
