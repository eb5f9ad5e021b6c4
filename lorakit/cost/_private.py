"""Private names of torch and transformers that this package uses, one small function each.

tests/cost/test_private.py checks them and names the version that breaks one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation that a config asks for; None if it leaves the choice to transformers."""
    found: str | None = config._attn_implementation
    return found


def set_attention(config: PretrainedConfig, implementation: str) -> None:
    """Set the attention implementation, also one that is not installed, without a check."""
    config._attn_implementation = implementation


def storage_of(tensor: Tensor) -> int:
    """A number that identifies a tensor's storage, also on the meta device, where `data_ptr` is 0."""
    return int(tensor.untyped_storage()._cdata)


def grouped_matmul() -> Any:
    """torch's operator for the products of experts, or None in versions of torch without it."""
    return getattr(torch.ops.aten, "_grouped_mm", None)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    """Attention by the flash kernel's operator, which saves no scores and which the meta device would not choose."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    found: Tensor = attention(query, key, value, dropout, causal, scale=scale)[0]
    return found
