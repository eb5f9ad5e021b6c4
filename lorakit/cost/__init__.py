"""What an adapter costs to train: parameters, memory and FLOPs, counted without allocating the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.cost._accounting import accounting as accounting
    from lorakit.cost._report import AccountedModule as AccountedModule
    from lorakit.cost._report import Accounting as Accounting
    from lorakit.cost._report import Flops as Flops
    from lorakit.cost._report import Memory as Memory
else:
    __getattr__, __dir__, __all__ = attach(__name__)
