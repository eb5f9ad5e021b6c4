"""The SpecLoRA subclasses of PEFT's LoRA layers: one for each kind of layer that PEFT adapts."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from einops import rearrange
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor
from torch.nn import functional as F

from lorakit.tuners import _private
from lorakit.tuners._layer import READABLE, SpecLoRALayer
from lorakit.tuners._mask import Mode, SpectralMask, rescaled_block

# The module that pickle looks these classes up in. It must be one that can be imported first: `speclora` imports PEFT,
# which registers the tuners, before it imports this file.
_PUBLIC = "lorakit.tuners.speclora"


class SpecLoRALinear(SpecLoRALayer, lora.Linear):
    """SpecLoRA on `nn.Linear` and on transformers' `Conv1D`."""


class SpecLoRAEmbedding(SpecLoRALayer, lora.Embedding):
    """SpecLoRA on `nn.Embedding`: d rescales the first k features of the first k token ids."""

    def base_weight(self: Any) -> Tensor:
        return self.oriented(self.get_base_layer().weight)

    def oriented(self: Any, weight: Tensor) -> Tensor:
        return rearrange(weight, "ids features -> features ids")

    def project(self: Any, adapter_name: str, x: Tensor, block: Tensor) -> Tensor:
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        index = x - column
        inside = (index >= 0) & (index < width)
        projected = F.embedding(index.clamp(0, width - 1), block.T) * inside.unsqueeze(-1)
        scale = _private.embedding_scale(self)
        return projected if scale is None else projected * scale.to(projected.dtype)


class _MaskedConv(SpecLoRALayer):
    """SpecLoRA on convolutions: d rescales the first k output and input channels, with their whole kernels."""

    def base_weight(self: Any) -> Tensor:
        return self.get_base_layer().weight

    def oriented(self: Any, weight: Tensor) -> Tensor:
        return weight

    def project(self: Any, adapter_name: str, x: Tensor, block: Tensor) -> Tensor:
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        channels = 1 - block.dim()
        return _private.convolve(self.get_base_layer(), x.narrow(channels, column, width).to(block.dtype), block)


class SpecLoRAConv1d(_MaskedConv, lora.layer.Conv1d):
    """SpecLoRA on `nn.Conv1d`."""


class SpecLoRAConv2d(_MaskedConv, lora.Conv2d):
    """SpecLoRA on `nn.Conv2d`."""


class SpecLoRAConv3d(_MaskedConv, lora.Conv3d):
    """SpecLoRA on `nn.Conv3d`."""


class _MaskMerged(SpecLoRALayer):
    """SpecLoRA on PEFT layers that compute with W + ΔW: their forward needs `get_delta_weight` only."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(SpecLoRALayer, self).forward(*args, **kwargs)  # type: ignore[misc]


class SpecLoRAMultiheadAttention(_MaskMerged, MultiheadAttention):
    """SpecLoRA on `nn.MultiheadAttention`: a mask on the fused input projection and one on the output projection."""

    def add_mask(self: Any, adapter_name: str, k: int, mode: Mode) -> None:
        out_proj: Any = self.base_layer.out_proj
        if type(out_proj) is lora.Linear:
            out_proj.__class__ = SpecLoRAOutProjection
        out_proj.add_mask(adapter_name, k, mode)
        super().add_mask(adapter_name, k, mode)

    def base_weight(self: Any) -> Tensor:
        return self.get_base_layer().in_proj_weight

    def weight_is_readable(self) -> bool:
        return True

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        out_proj = self.base_layer.out_proj
        if not self.merged:
            out_proj.keep_blocks()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            out_proj.release_blocks()


class SpecLoRAOutProjection(SpecLoRALinear):
    """The output projection of a `MultiheadAttention`.

    PEFT's attention layer merges and unmerges this projection's update itself, and then calls the projection's own
    `merge`, which would add the update a second time. So `merge` and `unmerge` only record what is merged.
    """

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [name for name in names if name in self.lora_A and name not in self.merged_adapters]

    def unmerge(self: Any) -> None:
        self.merged_adapters.clear()
        self.release_blocks()


class SpecLoRAParamWrapper(_MaskMerged, ParamWrapper):
    """SpecLoRA on a bare parameter (`target_parameters`). Stacked experts have one d each: (experts, k)."""

    def base_weight(self: Any) -> Tensor:
        return self.oriented(self.get_param())

    def oriented(self: Any, weight: Tensor) -> Tensor:
        if weight.dim() < self.get_param().dim():  # PEFT drops the experts' dimension of a single expert's update
            return rearrange(weight, "d_out d_in -> 1 d_out d_in")
        if weight.dim() == 3 and not _private.swaps_in_and_out(self):
            return rearrange(weight, "experts d_in d_out -> experts d_out d_in")
        return weight

    def weight_is_readable(self: Any) -> bool:
        return self.get_param().dtype in READABLE

    def stacked_experts(self: Any) -> tuple[int, ...]:
        return (self.num_experts,) if self.get_param().dim() == 3 else ()

    def block_of(self: Any, adapter_name: str) -> Tensor:
        # A copy: PEFT adds ΔW by a parametrization, which moves the parameter between forward and backward.
        return super().block_of(adapter_name).clone()

    def compute_block(self: Any, mask: SpectralMask) -> Tensor:
        if self.weight_is_readable():
            return super().compute_block(mask)
        dequantized = self.base_weight().detach().to(torch.float32)
        return rescaled_block(dequantized, mask).clone()

    def get_delta_factors(self: Any, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """PEFT's factors with k ranks more, which are the mask: a row selection times the block's update."""
        lhs, rhs, scaling = super().get_delta_factors(adapter_name)
        update = self.over_all_columns(adapter_name, self.mask_rows(adapter_name, dtype=lhs.dtype))  # (…, k, d_in)
        selection = self.row_selection(adapter_name, lhs).expand(*self.stacked_experts(), -1, -1)  # (…, d_out, k)
        left, right = (selection, update) if _private.swaps_in_and_out(self) else (update.mT, selection.mT)
        return torch.cat([lhs * scaling, left], dim=-1), torch.cat([rhs, right], dim=-2), 1.0


SpecLoRAParamWrapper.__name__ = "ParamWrapper"  # PEFT wraps a layer of this name once more

_CLASSES: dict[type, type] = {
    lora.Linear: SpecLoRALinear,
    lora.Embedding: SpecLoRAEmbedding,
    lora.layer.Conv1d: SpecLoRAConv1d,
    lora.Conv2d: SpecLoRAConv2d,
    lora.Conv3d: SpecLoRAConv3d,
    MultiheadAttention: SpecLoRAMultiheadAttention,
    ParamWrapper: SpecLoRAParamWrapper,
}

for _cls in (SpectralMask, SpecLoRALayer, SpecLoRAOutProjection, *_CLASSES.values()):
    _cls.__module__ = _PUBLIC

# PEFT's layers over quantized bases, with their modules. Some exist only where their backend is installed.
_QUANTIZED = {
    "Linear8bitLt": "bnb",
    "Linear4bit": "bnb",
    "GPTQLoraLinear": "gptq",
    "AwqLoraLinear": "awq",
    "HqqLoraLinear": "hqq",
    "TorchaoLoraLinear": "torchao",
    "EetqLoraLinear": "eetq",
    "AqlmLoraLinear": "aqlm",
    "IncLoraLinear": "inc",
}


def masked_class(cls: type) -> type | None:
    """The SpecLoRA subclass of PEFT layer `cls`, or None. A class that is one already is returned as it is."""
    if issubclass(cls, SpecLoRALayer):
        return cls
    module = _QUANTIZED.get(cls.__name__)
    if cls not in _CLASSES and module is not None and cls.__module__ == f"peft.tuners.lora.{module}":
        name = f"SpecLoRA{cls.__name__}"
        members = {"__module__": _PUBLIC, "__doc__": f"SpecLoRA on {cls.__name__}."}
        _CLASSES[cls] = type(name, (SpecLoRALayer, cls), members)
    return _CLASSES.get(cls)


def quantized_class(name: str) -> type | None:
    """The SpecLoRA class called `name` over a quantized layer of PEFT; None if unknown or its backend is missing."""
    peft_name = name.removeprefix("SpecLoRA")
    if peft_name == name or peft_name not in _QUANTIZED:
        return None
    cls = getattr(importlib.import_module(f"peft.tuners.lora.{_QUANTIZED[peft_name]}"), peft_name, None)
    return None if cls is None else masked_class(cls)
