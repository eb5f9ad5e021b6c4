"""Open an adapter, wherever it is: a directory, a file, a Hub id or a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.read import open_file_or_hub

if TYPE_CHECKING:
    from torch import nn


def open_adapter(adapter: str | os.PathLike[str] | nn.Module | Adapter, *, adapter_name: str | None = None) -> Adapter:
    """The one view over an adapter: of a directory, a .safetensors or .bin file, a Hub id, or a PeftModel.

    Of a PeftModel, `adapter_name` says which of its adapters, if not the one active; the view then follows the model,
    as its tensors are the parameters' own.
    Raises: AdapterFileError for what cannot be read, UnsupportedModelError for adapters of other kinds; TypeError for
    other arguments.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str | os.PathLike):
        if adapter_name is not None:
            raise TypeError("`adapter_name` is for adapters in a model; an adapter on disk has no name.")
        return open_file_or_hub(adapter)
    from lorakit.adapters.in_model import live_adapter

    return live_adapter(adapter, adapter_name)


def open_saved_adapter(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, *, adapter_name: str | None = None
) -> Adapter:
    """The view that `open_adapter` gives; of a PeftModel with all that its checkpoint would hold beside the updates.

    For whoever writes another adapter of this one. Raises: as `open_adapter`.
    """
    if isinstance(adapter, str | os.PathLike | Adapter):
        return open_adapter(adapter, adapter_name=adapter_name)
    from lorakit.adapters.in_model import saved_adapter

    return saved_adapter(adapter, adapter_name)
