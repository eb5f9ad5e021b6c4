"""The private names of PEFT that a pass reads and restores, one function each."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# PEFT can set which adapters are active, but doing so also changes `requires_grad`.
_ACTIVE_ADAPTER: dict[type, str] = {
    BaseTunerLayer: "_active_adapter",
    AuxiliaryTrainingWrapper: "_active_adapter",
    BaseTuner: "active_adapter",
    PeftModel: "active_adapter",
}


def active_adapters(module: nn.Module) -> dict[str, Any]:
    """The attributes in which PEFT keeps a module's active adapters, with copies of their values."""
    names = {name for kind, name in _ACTIVE_ADAPTER.items() if isinstance(module, kind)}
    return {name: copy.copy(getattr(module, name)) for name in names}


def set_active_adapters(module: nn.Module, values: dict[str, Any]) -> None:
    """Restore what `active_adapters` returned."""
    for name, value in values.items():
        setattr(module, name, value)
