"""lorakit: adapters, spectral tools and surgery for people who fine-tune with Hugging Face PEFT.

``import lorakit`` makes the adapter types SPECLORA and FISHERLORA known to PEFT, whether PEFT is imported before or
after it. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorakit import _registration
from lorakit._version import __version__

if TYPE_CHECKING:
    from lorakit import (
        adapters,
        allocation,
        calibration,
        compress,
        errors,
        export,
        fisher,
        lens,
        merging,
        spectral,
        statistics,
        surgery,
        tuners,
    )
    from lorakit.tuners.fisherlora import FisherLoRAConfig, FisherLoRAModel
    from lorakit.tuners.speclora import SpecLoRAConfig, SpecLoRAModel

__all__ = [
    "FisherLoRAConfig",
    "FisherLoRAModel",
    "SpecLoRAConfig",
    "SpecLoRAModel",
    "__version__",
    "adapters",
    "allocation",
    "calibration",
    "compress",
    "errors",
    "export",
    "fisher",
    "lens",
    "merging",
    "spectral",
    "statistics",
    "surgery",
    "tuners",
]

_ATTRIBUTES = {
    "FisherLoRAConfig": "lorakit.tuners.fisherlora",
    "FisherLoRAModel": "lorakit.tuners.fisherlora",
    "SpecLoRAConfig": "lorakit.tuners.speclora",
    "SpecLoRAModel": "lorakit.tuners.speclora",
}
_MODULES = (
    "adapters",
    "allocation",
    "calibration",
    "compress",
    "errors",
    "export",
    "fisher",
    "lens",
    "merging",
    "spectral",
    "statistics",
    "surgery",
    "tuners",
)


def __getattr__(name: str) -> Any:
    if name in _ATTRIBUTES:
        value = getattr(importlib.import_module(_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"lorakit.{name}")
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


_registration.register_when_peft_is_imported()
