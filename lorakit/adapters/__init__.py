"""Adapters, wherever they are: one view over directories, files, Hub ids and models, and how adapters are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter as Adapter
    from lorakit.adapters.adapter import AdapterModule as AdapterModule
    from lorakit.adapters.adapter import ExtraTensor as ExtraTensor
    from lorakit.adapters.adapter import TensorInfo as TensorInfo
    from lorakit.adapters.open import open_adapter as open_adapter
    from lorakit.adapters.open import open_saved_adapter as open_saved_adapter
else:
    __getattr__, __dir__, __all__ = attach(__name__)
