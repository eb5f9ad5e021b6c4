"""PEFT's LoRA variants on layers with SpecLoRA's mask.

The mask's update has rank k: (d − 1)[:, None] ⊙ P = D (P ·), with D the selection of k rows, scaled. So what a variant
makes of `scaling · B A` it can make of the two together, `scaling · [B, D] [A; P]`: DoRA normalizes the whole, and
activated LoRA adds the whole to the tokens after its invocation. The other variants add a term of their own, beside
which the mask's stands, as beside plain LoRA's; two of those do not merge by `get_delta_weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from lorakit.tuners._masked_layers import SpecLoRALayer


class _DownWithMask:
    """[A; P] as a module: the rank r of A comes first, then k channels more."""

    def __init__(self, layer: Any, adapter_name: str, dropout: nn.Module | None = None) -> None:
        self.layer, self.name, self.dropout = layer, adapter_name, dropout or nn.Identity()

    def __call__(self, x: Tensor) -> Tensor:
        layer, down = self.layer, self.layer.lora_A[self.name]
        block = layer.block_of(self.name)
        projected = layer.project(self.name, x, block)
        return torch.cat([down(self.dropout(x)), projected.to(down.weight.dtype)], dim=1 - block.dim())

    @property
    def weight(self) -> Tensor:
        """(r + k, d_in, *kernel); of a linear layer A alone, of which variants ask only dtype, device and d_in."""
        down: Tensor = self.layer.lora_A[self.name].weight
        if down.dim() == 2:
            return down
        block = self.layer.block_of(self.name).to(down.dtype)
        return torch.cat([down, self.layer.over_all_columns(self.name, block)])


class _UpWithMask:
    """[B, D] as a module."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer, self.name = layer, adapter_name

    def _values(self) -> Tensor:
        """d − 1 in units of the adapter's scaling, by which everything is multiplied in the end."""
        values: Tensor = self.layer.lora_spec[self.name].weight / self.layer.initial_scaling(self.name)
        return values

    def columns(self, like: Tensor) -> Tensor:
        """D (d_out, k), in the dtype of `like`."""
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
    """A masked layer as a variant sees it, its factors being those of the whole update."""

    def __init__(self, layer: Any, adapter_name: str, *, dropout_in_a: bool = False) -> None:
        self._layer = layer
        if adapter_name in layer.lora_embedding_A:
            # here PEFT's factors are bare tensors: (r, ids) and (features, r)
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
    """A variant whose forward has the mask's term in it."""

    dropout_in_a = False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        seen = _LayerWithMask(module, active_adapter, dropout_in_a=self.dropout_in_a)
        return super().forward(seen, active_adapter=active_adapter, x=x, result=result, **kwargs)


class MaskInDora(MaskInForward):
    """DoRA, which scales what the adapters before it have added to the result: their masks' terms must be in it."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        for name in module.masks_due(module.active_adapters, before=active_adapter):
            result = module.add_mask_term(name, x, result)
        return super().forward(module, active_adapter, x, result, **kwargs)


class MaskInMerge(LoraVariant):
    """A variant that merges an update of its own making: the mask's is added beside it."""

    def merge_safe(self, module: SpecLoRALayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged: Tensor = super().merge_safe(module, active_adapter, orig_weight)
        module.add_mask_delta(merged, active_adapter)
        return merged

    def merge_unsafe(self, module: SpecLoRALayer, active_adapter: str, orig_weight: Tensor) -> None:
        super().merge_unsafe(module, active_adapter, orig_weight)
        module.add_mask_delta(orig_weight.data, active_adapter)

    def unmerge(self, module: SpecLoRALayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
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
    dropout_in_a = True  # the mask's input is not dropped out, as it is not without the variant


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
            """Truncate the base weight, if that is still to be done, before a part of it is taken."""
            self._apply_deferred_truncation(module, adapter_name)

    _MASKED.append(MaskedKasa)

# Their forward adds a term to the result, and they merge by `get_delta_weight`.
_AS_THEY_ARE = (
    variants.VeloraLinearVariant,
    variants.MontecloraLinearVariant,
    variants.MiCALinearVariant,
    variants.MiCAEmbeddingVariant,
)


def masked_variant(variant: LoraVariant) -> LoraVariant:
    """The variant for a layer with a mask that does what `variant` does.

    Raises: UnsupportedModelError for a variant of which nothing is known.
    """
    if isinstance(variant, (MaskInForward, MaskInMerge, *_AS_THEY_ARE)):
        return variant
    cls = {masked.__bases__[1]: masked for masked in _MASKED}.get(type(variant))
    if cls is None:
        raise UnsupportedModelError(
            f"SpecLoRA does not support {type(variant).__name__}; leave the option that asks for it out, or use "
            f"LoraConfig."
        )
    return cls()
