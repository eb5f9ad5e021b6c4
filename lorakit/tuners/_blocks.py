"""The blocks that an adapter's masks rescale, computed for all modules of one shape together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lorakit.tuners._layer import SpecLoRALayer
from lorakit.tuners._mask import SpectralMask, svd_blocks

_SVD_CHUNK = 1 << 26  # weight elements in one batched SVD


def compute_blocks(model: nn.Module, adapter_name: str) -> None:
    """Compute the blocks that an adapter's masks rescale, where they are not views of the base weights.

    The svd modes take one full SVD per module, batched by shape. Of a quantized weight only the block is dequantized.
    """
    batched: dict[Any, list[tuple[Any, SpectralMask]]] = {}
    single: list[tuple[Any, SpectralMask]] = []
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if not isinstance(layer, SpecLoRALayer) or adapter_name not in layer.lora_spec:
            continue
        mask: Any = layer.lora_spec[adapter_name]
        if mask.reads_weight or mask.block is not None or not layer.base_is_ready(adapter_name):
            continue
        if layer.weight_is_readable():
            weight = layer.base_weight()
            key = (weight.shape, weight.dtype, weight.device, mask.weight.shape, mask.mode)
            batched.setdefault(key, []).append((layer, mask))
        else:
            single.append((layer, mask))
    total = sum(map(len, batched.values())) + len(single)
    with tqdm(total=total, desc="SpecLoRA: blocks of the base weights", delay=1.0, unit="module") as progress:
        for (shape, *_), group in batched.items():
            step = max(1, _SVD_CHUNK // math.prod(shape))
            for start in range(0, len(group), step):
                chunk = group[start : start + step]
                weights = torch.stack([layer.base_weight().detach() for layer, _ in chunk])
                for (_, mask), block in zip(chunk, svd_blocks(weights, chunk[0][1], stacked=1), strict=True):
                    mask.block = block.clone()
                progress.update(len(chunk))
        for layer, mask in single:
            mask.block = layer.compute_block(mask)
            progress.update(1)
