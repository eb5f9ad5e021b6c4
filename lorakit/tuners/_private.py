"""The private names of PEFT and torch that the tuners depend on, one function each.

tests/tuners/test_private.py says which version of which library changed one of them. The private methods of PEFT's
`LoraModel` that the tuners override are listed in that test.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import tuners_utils
from torch import Tensor, nn


def in_and_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """The numbers of inputs and outputs that PEFT sees in a base layer; None where it knows none."""
    features: tuple[int | None, int | None] = tuners_utils._get_in_out_features(module)
    return features


def move_adapter_to_base_device(layer: Any, adapter_name: str) -> None:
    """Move an adapter's tensors to the device of the base layer."""
    layer._move_adapter_to_device_of_base_layer(adapter_name)


def awaits_kasa_truncation(layer: Any, adapter_name: str) -> bool:
    """Whether KaSA has yet to truncate the base weight for this adapter."""
    return adapter_name in getattr(layer, "_lora_kasa_truncation_deferred", ())


def apply_kasa_truncation(variant: Any, layer: Any, adapter_name: str) -> None:
    """Truncate the base weight for a KaSA adapter, unless that has been done."""
    variant._apply_deferred_truncation(layer, adapter_name)


def embedding_scale(layer: Any) -> Tensor | None:
    """The factor that some models' embeddings multiply their rows by (Gemma's); None for others."""
    scale: Tensor | None = layer._get_embed_scale()
    return scale


def swaps_in_and_out(wrapper: Any) -> bool:
    """Whether PEFT has exchanged the input and output dimensions of a wrapped parameter."""
    return bool(wrapper._did_swap_in_out_features)


def convolve(conv: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Apply `weight` with the stride, padding and dilation of a torch convolution, without its bias."""
    result: Tensor = conv._conv_forward(x, weight, None)
    return result


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own registry of its children; changing it changes the module."""
    return module._modules


def registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Everywhere a module may keep a tensor: its parameters, buffers and plain attributes."""
    return module._parameters, module._buffers, vars(module)


def in_functorch_transform() -> bool:
    """Whether `torch.func` transforms the present computation (grad, vmap, jvp)."""
    return bool(torch._C._are_functorch_transforms_active())
