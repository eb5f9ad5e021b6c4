"""Ranks under a budget: scores and costs of modules in, integer ranks out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.allocation.budget import Unit as Unit
    from lorakit.allocation.budget import read_budget as read_budget
    from lorakit.allocation.masks import AllocatedMask as AllocatedMask
    from lorakit.allocation.masks import MaskAllocation as MaskAllocation
    from lorakit.allocation.masks import allocate_masks as allocate_masks
    from lorakit.allocation.masks import shuffled as shuffled
    from lorakit.allocation.probed import MaskProbeReport as MaskProbeReport
    from lorakit.allocation.probed import Probed as Probed
    from lorakit.allocation.probed import ProbedMask as ProbedMask
    from lorakit.allocation.probed import ProbedMaskStep as ProbedMaskStep
    from lorakit.allocation.probed import ProbedModule as ProbedModule
    from lorakit.allocation.probed import ProbeReport as ProbeReport
    from lorakit.allocation.probed import masks_from_probe as masks_from_probe
    from lorakit.allocation.probed import ranks_from_probe as ranks_from_probe
    from lorakit.allocation.report import RULES as RULES
    from lorakit.allocation.report import AllocatedModule as AllocatedModule
    from lorakit.allocation.report import Allocation as Allocation
    from lorakit.allocation.report import Per as Per
    from lorakit.allocation.report import Rule as Rule
    from lorakit.allocation.rules import allocate as allocate
else:
    __getattr__, __dir__, __all__ = attach(__name__)
