"""Open an adapter: a directory, a file, a Hub id or a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.read import open_file_or_hub

if TYPE_CHECKING:
    from torch import nn


def open_adapter(adapter: str | os.PathLike[str] | nn.Module | Adapter, *, adapter_name: str | None = None) -> Adapter:
    """Open an adapter: a directory, a .safetensors or .bin file, a Hub id, or a PeftModel.

    `adapter_name` selects one of a PeftModel's adapters; by default the active one. The tensors are then the model's
    own parameters, so they change with it. An `Adapter` is returned as it is.
    Raises: AdapterFileError for files that cannot be read; UnsupportedModelError for other kinds of adapters; TypeError
        for other arguments.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> adapter = open_adapter(get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0"])))
        >>> [(module.name, module.rank, module.scaling) for module in adapter.modules]
        [('0', 2, 2.0)]
    """
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str | os.PathLike):
        if adapter_name is not None:
            raise TypeError("`adapter_name` selects an adapter of a PeftModel; an adapter on disk has no name.")
        return open_file_or_hub(adapter)
    from lorakit.adapters.in_model import live_adapter

    return live_adapter(adapter, adapter_name)


def open_saved_adapter(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, *, adapter_name: str | None = None
) -> Adapter:
    """Open an adapter as `open_adapter` does, and of a PeftModel also everything else that PEFT would save with it.

    Use it to write a new adapter from this one. Raises: as `open_adapter`.
    """
    if isinstance(adapter, str | os.PathLike | Adapter):
        return open_adapter(adapter, adapter_name=adapter_name)
    from lorakit.adapters.in_model import saved_adapter

    return saved_adapter(adapter, adapter_name)
