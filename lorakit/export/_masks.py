"""SpecLoRA's mask as k more ranks of a plain LoRA, and where no plain LoRA means the same."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.lora.variants import MontecloraLinearVariant
from torch import Tensor

from lorakit.adapters.in_model import LiveModule
from lorakit.errors import ExportError
from lorakit.tuners._layers import SpecLoRAOutProjection
from lorakit.tuners._variants import MaskInMerge


def has_mask(module: LiveModule) -> bool:
    """Whether the adapter has a mask of SpecLoRA's in this module."""
    return module.adapter_name in getattr(module.layer, "lora_spec", {})


def check_mask(module: LiveModule) -> None:
    """Raise ExportError where PEFT's plain LoRA layer would not compute the mask's update from k more ranks."""
    layer: Any = module.layer
    if not has_mask(module):
        return
    base = layer.get_base_layer()
    variant = layer.lora_variant.get(module.adapter_name)
    reason = None
    if isinstance(layer, MultiheadAttention | SpecLoRAOutProjection):
        reason = "is an attention layer, where PEFT's plain LoRA adds the output projection's update twice"
    elif getattr(base, "padding_mode", "zeros") != "zeros" or any(step != 1 for step in getattr(base, "dilation", ())):
        reason = "pads or dilates as PEFT's plain LoRA of a convolution does not"
    elif isinstance(variant, MaskInMerge | MontecloraLinearVariant):
        name = type(variant).__name__.replace("Masked", "")
        reason = f"uses {name.removesuffix('LinearVariant')}, whose tensors cannot have more ranks"
    if reason is not None:
        raise ExportError(
            f"{module.name!r} {reason}, so that SpecLoRA's mask cannot be written; use merge_and_unload()."
        )


def mask_update(module: LiveModule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mask's own update, (d − 1)[:, None] ⊙ P in its place, as factors A and B of rank k; B selects rows.

    A is (k, d_in), of a convolution (k, d_in, *kernel), and B (d_out, k).
    """
    layer: Any = module.layer
    rows = layer.mask_rows(module.adapter_name, dtype=torch.promote_types(dtype, torch.float32))
    return layer.over_all_columns(module.adapter_name, rows), layer.row_selection(module.adapter_name, rows)
