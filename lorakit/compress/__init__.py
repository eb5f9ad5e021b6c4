"""Adapters of lower rank: the best one under given ranks, an energy, a budget or a bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.compress._heal import Healed as Healed
    from lorakit.compress._report import CompressedModule as CompressedModule
    from lorakit.compress._report import CompressReport as CompressReport
    from lorakit.compress._smallest import smallest as smallest
    from lorakit.compress._truncate import truncate as truncate
    from lorakit.compress.ladder import SmallestReport as SmallestReport
    from lorakit.compress.ladder import SmallestStep as SmallestStep
else:
    __getattr__, __dir__, __all__ = attach(__name__)
