"""PEFT's LoRA variants (DoRA, activated LoRA, …) on layers with SpecLoRA's mask.

The mask's update (d − 1)[:, None] ⊙ P has rank k. It is D P, where D selects k rows and scales them. A variant that
works on `scaling · B A` can therefore work on both updates at once, as `scaling · [B, D] [A; P]`: DoRA normalizes the
sum, and activated LoRA adds the sum to the tokens after its invocation. All other variants add a term of their own, and
the mask's term is added separately, as with plain LoRA. BD-LoRA and KaSA do not merge by `get_delta_weight`, so their
merge methods add the mask's update too.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import UnsupportedModelError
from lorakit.tuners import _private


class _DownWithMask:
    """[A; P] in the place of lora_A: its output has r + k channels, A's first."""

    def __init__(self, layer: Any, adapter_name: str, dropout: nn.Module | None = None) -> None:
        self.layer, self.name, self.dropout = layer, adapter_name, dropout or nn.Identity()

    def __call__(self, x: Tensor) -> Tensor:
        layer, down = self.layer, self.layer.lora_A[self.name]
        block = layer.block_of(self.name)
        projected = layer.project(self.name, x, block)
        return torch.cat([down(self.dropout(x)), projected.to(down.weight.dtype)], dim=1 - block.dim())

    @property
    def weight(self) -> Tensor:
        """(r + k, d_in, *kernel). For a linear layer A alone: variants read only its dtype, device and d_in."""
        down: Tensor = self.layer.lora_A[self.name].weight
        if down.dim() == 2:
            return down
        block = self.layer.block_of(self.name).to(down.dtype)
        return torch.cat([down, self.layer.over_all_columns(self.name, block)])


class _UpWithMask:
    """[B, D] in the place of lora_B."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer, self.name = layer, adapter_name

    def _values(self) -> Tensor:
        """d − 1 divided by the adapter's scaling, because the variant multiplies everything by the scaling."""
        values: Tensor = self.layer.lora_spec[self.name].weight / self.layer.initial_scaling(self.name)
        return values

    def columns(self, like: Tensor) -> Tensor:
        """D, of shape (d_out, k), in the dtype and on the device of `like`."""
        selected: Tensor = self.layer.row_selection(self.name, like)
        return selected * self._values().to(like.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        up, spatial = self.layer.lora_B[self.name], self.layer.block_of(self.name).dim() - 2
        values, mask = self._values(), self.layer.lora_spec[self.name]
        before = mask.region(self.layer.out_features, self.layer.in_features)[0]
        after = self.layer.out_features - before - mask.k
        low_rank, projected = torch.split(hidden, [hidden.shape[-1 - spatial] - mask.k, mask.k], -1 - spatial)
        term = projected * values.reshape(-1, *[1] * spatial)
        result: Tensor = up(low_rank) + F.pad(term, (0, 0) * spatial + (before, after))
        return result

    @property
    def weight(self) -> Tensor:
        """(d_out, r + k, 1, …)."""
        up = self.layer.lora_B[self.name].weight
        columns = self.columns(up)
        return torch.cat([up, columns.reshape(*columns.shape, *[1] * (up.dim() - 2))], dim=1)


class _LayerWithMask:
    """What a variant gets in the place of the layer: the same, but its factors are [A; P] and [B, D]."""

    def __init__(self, layer: Any, adapter_name: str, *, dropout_in_a: bool = False) -> None:
        self._layer = layer
        if adapter_name in layer.lora_embedding_A:
            # PEFT keeps an embedding's factors as bare tensors: (r, ids) and (features, r)
            A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
            rows = layer.over_all_columns(adapter_name, layer.block_of(adapter_name).to(A.dtype))
            self.lora_embedding_A = {adapter_name: torch.cat([A, rows])}
            self.lora_embedding_B = {adapter_name: torch.cat([B, _UpWithMask(layer, adapter_name).columns(B)], dim=1)}
            return
        dropout = layer.lora_dropout[adapter_name]
        self.lora_A = {adapter_name: _DownWithMask(layer, adapter_name, dropout if dropout_in_a else None)}
        self.lora_B = {adapter_name: _UpWithMask(layer, adapter_name)}
        if dropout_in_a:
            self.lora_dropout = {adapter_name: nn.Identity()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class MaskInForward(LoraVariant):
    """For variants whose forward includes the mask's term."""

    dropout_in_a = False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        seen = _LayerWithMask(module, active_adapter, dropout_in_a=self.dropout_in_a)
        return super().forward(seen, active_adapter=active_adapter, x=x, result=result, **kwargs)


class MaskInDora(MaskInForward):
    """For DoRA, which rescales the result so far: the mask terms of the adapters before it are added first."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        for name in module.masks_due(module.active_adapters, before=active_adapter):
            result = module.add_mask_term(name, x, result)
        return super().forward(module, active_adapter, x, result, **kwargs)


class MaskInMerge(LoraVariant):
    """For variants that do not merge by `get_delta_weight`: the mask's update is merged and unmerged here."""

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged: Tensor = super().merge_safe(module, active_adapter, orig_weight)
        module.add_mask_delta(merged, active_adapter)
        return merged

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        super().merge_unsafe(module, active_adapter, orig_weight)
        module.add_mask_delta(orig_weight.data, active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        unmerged: Tensor = super().unmerge(module, active_adapter, orig_weight)
        module.add_mask_delta(unmerged, active_adapter, -1)
        return unmerged


class MaskedDoraLinear(MaskInDora, variants.DoraLinearVariant):
    pass


class MaskedDoraEmbedding(MaskInDora, variants.DoraEmbeddingVariant):
    pass


class MaskedDoraConv1d(MaskInDora, variants.DoraConv1dVariant):
    pass


class MaskedDoraConv2d(MaskInDora, variants.DoraConv2dVariant):
    pass


class MaskedDoraConv3d(MaskInDora, variants.DoraConv3dVariant):
    pass


class MaskedALora(MaskInForward, variants.ALoraLinearVariant):
    dropout_in_a = True  # dropout applies to A's input alone, as without the variant


class MaskedBdLora(MaskInMerge, variants.BdLoraLinearVariant):
    pass


_MASKED: list[type[LoraVariant]] = [
    MaskedDoraLinear,
    MaskedDoraEmbedding,
    MaskedDoraConv1d,
    MaskedDoraConv2d,
    MaskedDoraConv3d,
    MaskedALora,
    MaskedBdLora,
]

if hasattr(variants, "KasaLinearVariant"):  # since PEFT 0.21

    class MaskedKasa(MaskInMerge, variants.KasaLinearVariant):
        def prepare_weight(self, module: Any, adapter_name: str) -> None:
            """Let KaSA truncate the base weight before the mask's block is copied from it."""
            _private.apply_kasa_truncation(self, module, adapter_name)

    _MASKED.append(MaskedKasa)

# Variants that need no change: their forward adds a term to the result, and they merge by `get_delta_weight`.
_UNCHANGED = (
    variants.VeloraLinearVariant,
    variants.MontecloraLinearVariant,
    variants.MiCALinearVariant,
    variants.MiCAEmbeddingVariant,
)


def masked_variant(variant: LoraVariant) -> LoraVariant:
    """The counterpart of `variant` for a layer with a mask.

    Raises: UnsupportedModelError for a variant that lorakit does not know.
    """
    if isinstance(variant, (MaskInForward, MaskInMerge, *_UNCHANGED)):
        return variant
    cls = {masked.__bases__[1]: masked for masked in _MASKED}.get(type(variant))
    if cls is None:
        raise UnsupportedModelError(
            f"SpecLoRA does not support {type(variant).__name__}. Leave out the option that selects it, or use "
            f"LoraConfig."
        )
    return cls()
