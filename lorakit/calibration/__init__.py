"""One pass of a loader through a model that collects statistics per example."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.calibration.losses import IGNORED_LABEL as IGNORED_LABEL
    from lorakit.calibration.losses import LossFn as LossFn
    from lorakit.calibration.run import Probe as Probe
    from lorakit.calibration.run import collect as collect
    from lorakit.calibration.tally import Collected as Collected
else:
    __getattr__, __dir__, __all__ = attach(__name__)
