"""What optimizers keep between steps, in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

_BLOCK, _SMALLEST = 256, 4096  # entries of a block, and of the smallest tensor with 8-bit states, in bitsandbytes


def _adamw_8bit(n: int, itemsize: int) -> int:
    return 8 * n if n < _SMALLEST else 2 * (n + 4 * math.ceil(n / _BLOCK))


# The bytes of the states of a tensor with n entries of `itemsize` bytes, and a description of them.
OPTIMIZERS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "adamw": (
        lambda n, itemsize: 2 * n * itemsize + 4,
        "two moments an entry and one step a tensor, as torch keeps them, in the dtype of the parameter",
    ),
    "adamw_8bit": (
        _adamw_8bit,
        f"two 8-bit moments an entry and fp32 scales for each {_BLOCK} of them; two fp32 moments in tensors of fewer "
        f"than {_SMALLEST} entries",
    ),
    "sgd": (lambda n, itemsize: 0, "none"),
    "sgd_momentum": (lambda n, itemsize: n * itemsize, "one momentum an entry, in the dtype of the parameter"),
}
