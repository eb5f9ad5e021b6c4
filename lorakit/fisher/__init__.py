"""The Fisher probe: how sensitive the loss is to each adapted module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.fisher._probe import probe as probe
    from lorakit.fisher._report import Estimate as Estimate
    from lorakit.fisher._report import FisherGroup as FisherGroup
    from lorakit.fisher._report import FisherReport as FisherReport
    from lorakit.fisher._report import FisherRow as FisherRow
    from lorakit.fisher._report import MaskStep as MaskStep
    from lorakit.fisher._report import Moments as Moments
else:
    __getattr__, __dir__, __all__ = attach(__name__)
