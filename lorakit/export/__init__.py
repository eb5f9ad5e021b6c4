"""Any of lorakit's adapters as a plain LoRA, which PEFT loads without lorakit and servers serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.export._report import ExportedModule as ExportedModule
    from lorakit.export._report import ExportReport as ExportReport
    from lorakit.export._to_lora import to_lora as to_lora
else:
    __getattr__, __dir__, __all__ = attach(__name__)
