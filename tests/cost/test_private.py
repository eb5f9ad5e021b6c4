"""The private names of torch and transformers that lorakit.cost uses exist and behave as it expects."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from lorakit.cost import _meta, _private

TORCH, TRANSFORMERS = f"torch {torch.__version__}", f"transformers {transformers.__version__}"


def test_the_attention_implementation_of_a_config():
    config = LlamaConfig(attn_implementation="flash_attention_2")
    assert hasattr(config, "_attn_implementation"), f"{TRANSFORMERS}: configs have no `_attn_implementation`"
    assert _private.attention_of(config) == "flash_attention_2", f"{TRANSFORMERS}: `_attn_implementation` changed"
    _private.set_attention(config, "sdpa")
    assert _private.attention_of(config) == "sdpa", f"{TRANSFORMERS}: `_attn_implementation` cannot be set"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_told_apart(device):
    one, other = (torch.empty(4, device=device) for _ in range(2))
    assert hasattr(one.untyped_storage(), "_cdata"), f"{TORCH}: storages have no `_cdata`"
    assert _private.storage_of(one) == _private.storage_of(one[1:]), f"{TORCH}: `_cdata` differs between views"
    assert _private.storage_of(one) != _private.storage_of(other), f"{TORCH}: `_cdata` does not identify a storage"


def test_grouped_products_are_counted():
    operator = _private.grouped_matmul()
    assert operator is not None, f"{TORCH}: no `aten._grouped_mm`; how are the products of experts computed?"
    with FlopCounterMode(display=False, custom_mapping=_meta._FORMULAS) as counter, torch.device("meta"):
        a, b = torch.empty(16, 32, dtype=torch.bfloat16), torch.empty(4, 32, 64, dtype=torch.bfloat16)
        operator(a, b, torch.empty(4, dtype=torch.int32))
    assert counter.get_total_flops() == 2 * 16 * 32 * 64, f"{TORCH}: `aten._grouped_mm` is not counted"


def test_flash_attention_computes_attention():
    query, key, value = (torch.randn(1, 2, 8, 16) for _ in range(3))
    assert hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention"), f"{TORCH}: no flash attention operator"
    for causal in (False, True):
        with torch.device("meta"):
            shapes = [tensor.to("meta") for tensor in (query, key, value)]
            found = _private.flash_attention(*shapes, dropout=0.0, causal=causal, scale=0.25)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.25)
        assert found.shape == expected.shape, f"{TORCH}: the flash attention operator changed its results"
