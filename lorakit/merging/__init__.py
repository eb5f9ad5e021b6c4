"""Several adapters as one plain LoRA: exact sums from the factors, cut sums, TIES and DARE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.merging._merge import merge as merge
    from lorakit.merging._report import MergedModule as MergedModule
    from lorakit.merging._report import MergeReport as MergeReport
    from lorakit.merging._retention import ScoreDifference as ScoreDifference
    from lorakit.merging._retention import TaskRetention as TaskRetention
else:
    __getattr__, __dir__, __all__ = attach(__name__)
