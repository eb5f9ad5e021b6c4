"""PEFT's LoRA layers with SpecLoRA's mask: one class for each kind of layer that PEFT adapts."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from accelerate.utils import align_module_device
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.tuners._masked_variants import MaskInDora, MaskInForward, masked_variant

Mode = Literal["hadamard", "hadamard_bottom", "svd", "svd_bottom"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Where these classes are found, also by pickle: a module that can be the first one imported.
_PUBLIC = "lorakit.tuners.speclora"
_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SpectralMask(nn.Module):
    """The learnable part of one module's mask.

    `weight` (k,), or (experts, k), is d − 1, so that zero means no change: weight decay pulls towards the identity,
    and half precision keeps its resolution there. `block` is the frozen P that d rescales, where it is not read off
    the base weight (svd modes, quantized weights); it is never saved.
    """

    block: Tensor | None

    def __init__(self, k: int, mode: Mode, *, experts: tuple[int, ...] = (), reads_weight: bool = True) -> None:
        super().__init__()
        self.k = k  # not read off `weight`, of which FSDP keeps only a part between its own forward passes
        self.mode = mode
        self.reads_weight = reads_weight and mode.startswith("hadamard")
        self.weight = nn.Parameter(torch.zeros(*experts, k))
        self.register_buffer("block", None, persistent=False)

    def forward(self, result: Tensor, projected: Tensor, factor: float, row: int, channels: int = -1) -> Tensor:
        """`result` with (d − 1) ⊙ `projected`, times `factor`, added in place to its channels from `row` on.

        `channels` is their dimension in both, of which `projected` has k. A call of the module, so that accelerate's
        hooks bring an offloaded d in.
        """
        weight = self.weight if isinstance(factor, float) and factor == 1.0 else self.weight * factor
        weight = weight.reshape(-1, *[1] * (-1 - channels))
        if is_plain_training():
            added: Tensor = AddTerm.apply(result, projected, weight, row, channels)  # type: ignore[no-untyped-call]
            return added
        result.narrow(channels, row, self.k).add_(projected * weight)
        return result

    def region(self, d_out: int, d_in: int) -> tuple[int, int, int]:
        """First row, first column and number of columns of what d rescales."""
        if self.mode == "hadamard":
            return 0, 0, self.k
        if self.mode == "hadamard_bottom":
            return d_out - self.k, d_in - self.k, self.k
        return 0, 0, d_in

    def extra_repr(self) -> str:
        return f"k={self.k}, mode={self.mode}"


class TapInput(torch.autograd.Function):
    """x itself, for the rest of the layer, and P x: what flows back from P x is added to a few columns of the rest's.

    Autograd by itself would pad it with zeros to the whole width, and then add two tensors of that width. What comes
    back from the rest is a sum that autograd has just made, of the base layer's part and A's: nobody else has it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, column: int) -> tuple[Tensor, Tensor]:
        projected = F.linear(x.narrow(-1, column, block.shape[1]).to(block.dtype), block)
        ctx.save_for_backward(block.to(projected.dtype))  # which autocast chooses
        ctx.column = column
        return x.view_as(x), projected

    @staticmethod
    def backward(ctx: Any, from_rest: Tensor, from_projected: Tensor) -> tuple[Tensor, None, None]:
        (block,) = ctx.saved_tensors
        # where the backward pass is itself recorded, for a second derivative, nothing may be changed in place
        gradient = from_rest.clone() if torch.is_grad_enabled() else from_rest
        gradient.narrow(-1, ctx.column, block.shape[1]).add_(from_projected @ block)
        return gradient, None, None


class AddTerm(torch.autograd.Function):
    """`result` with `projected` ⊙ `weight` added in place to some of its channels.

    Autograd by itself would copy the gradient of the whole result, as for any change of a view.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, projected: Tensor, weight: Tensor, row: int, channels: int) -> Tensor:
        result.narrow(channels, row, weight.shape[0]).add_(projected * weight)
        ctx.mark_dirty(result)
        ctx.save_for_backward(projected, weight)
        ctx.row, ctx.channels = row, channels
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        projected, weight = ctx.saved_tensors
        dtype = torch.promote_types(projected.dtype, weight.dtype)
        rows = gradient.narrow(ctx.channels, ctx.row, weight.shape[0]).to(dtype)
        of_weight = (rows * projected).sum_to_size(weight.shape)
        return gradient, (rows * weight).to(projected.dtype), of_weight, None, None


def is_plain_training() -> bool:
    """Whether autograd records eagerly: neither does a compiler trace, nor does `torch.func` transform."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class SpecLoRALayer:
    """What SpecLoRA adds to a LoRA layer of PEFT's.

    Weights are taken with the output dimension first and the input dimension second, whatever the layer stores: of an
    embedding those are features and token ids, of a convolution output and input channels (the kernel follows), and
    experts stacked in one parameter come before both.

    Not derived from LoraLayer: a layer that PEFT has made becomes a masked one by a change of its class, which Python
    allows only where the memory layouts agree.
    """

    lora_spec: nn.ModuleDict
    _mask_off = False

    def add_mask(self: Any, adapter_name: str, k: int, mode: Mode) -> None:
        """Give an adapter that the layer already has a mask, with d = 1; k is clipped to the weight's smaller side."""
        if "lora_spec" not in self._modules:
            self.lora_spec = nn.ModuleDict()
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_spec")
        self.lora_spec[adapter_name] = SpectralMask(
            min(k, self.in_features, self.out_features),
            mode,
            experts=self._experts(),
            reads_weight=self.weight_is_readable(),
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        variant = self.lora_variant.get(adapter_name)
        if variant is not None:
            self.lora_variant[adapter_name] = masked_variant(variant)
            if self.initial_scaling(adapter_name) == 0 and isinstance(self.lora_variant[adapter_name], MaskInForward):
                raise ValueError("SpecLoRA does not support lora_alpha=0 together with DoRA or activated LoRA.")

    def base_weight(self: Any) -> Tensor:
        """The frozen weight (d_out, d_in): a view."""
        return transpose(self.get_base_layer().weight, getattr(self, "fan_in_fan_out", False))

    def block_of(self: Any, adapter_name: str) -> Tensor:
        """The P that the adapter's d rescales, (k, columns); where it is part of the base weight, a view of that."""
        mask = self.lora_spec[adapter_name]
        if mask.block is not None:
            return mask.block
        if mask.reads_weight:
            weight = self.base_weight()
            if not weight.is_meta:
                return _block(weight, mask)
        with align_module_device(self.get_base_layer()):  # where it is offloaded: bring it in once, keep what is needed
            block = self.compute_block(mask)
        if not block.is_meta:
            mask.block = block
        return block

    @torch.no_grad()
    def compute_block(self: Any, mask: SpectralMask) -> Tensor:
        """A copy of what `mask` rescales, from the base weight as it is now."""
        if self.weight_is_readable():
            return _block(self.base_weight().detach(), mask).clone()
        row, column, width = mask.region(self.out_features, self.in_features)
        if not mask.mode.startswith("hadamard"):
            return _block(self._measured_columns(0, self.in_features), mask)
        return self._measured_columns(column, width)[row : row + mask.k].clone()

    def weight_is_readable(self: Any) -> bool:
        """Whether the base weight is a tensor of numbers, and not quantized."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return type(weight) is nn.Parameter and weight.dtype in _READABLE

    def base_is_ready(self: Any, adapter_name: str) -> bool:
        """Whether the base weight has its values, and those that the adapter is to see."""
        if any(parameter.is_meta for parameter in self.get_base_layer().parameters()):
            return False
        return adapter_name not in getattr(self, "_lora_kasa_truncation_deferred", ())

    def _experts(self) -> tuple[int, ...]:
        return ()

    def _measured_columns(self: Any, column: int, width: int) -> Tensor:
        """Columns of a quantized weight, (d_out, width): what the base layer makes of unit vectors, without its bias.

        Whatever the kernel, that is the weight it computes with, and nothing else is dequantized for good.
        """
        base = self.get_base_layer()
        tensors = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
        device = tensors[0].device if tensors else base.device
        bias = getattr(base, "bias", None)
        # Where a module keeps it, and not by assignment: that would put the bias on the meta device while PEFT loads an
        # adapter with low_cpu_mem_usage.
        holders = [h for h in (base._parameters, base._buffers, vars(base)) if h.get("bias") is not None]
        # bitsandbytes takes the dtype of the first input it sees for good, unless told to forget it
        kept = {name: getattr(base, name) for name in ("compute_dtype", "compute_type_is_set") if hasattr(base, name)}
        candidates = [
            *(kept.get("compute_dtype"), getattr(bias, "dtype", None)),
            *(torch.float32, torch.float16, torch.bfloat16),
        ]
        floating = [dtype for dtype in candidates if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
        try:
            for holder in holders:
                holder["bias"] = None
            for dtype in dict.fromkeys(floating):
                units = torch.zeros(width, self.in_features, dtype=dtype, device=device)
                units.diagonal(offset=column).fill_(1)
                # bitsandbytes repacks its weight for good, into a form without gradients, at an input that needs none
                units.requires_grad_()
                try:
                    columns: Tensor = base(units).T
                except (RuntimeError, ValueError, TypeError, AssertionError):  # a kernel that has no such dtype
                    if dtype == floating[-1]:
                        raise
                else:
                    return columns
        finally:
            for holder in holders:
                holder["bias"] = bias
            for name, value in kept.items():
                setattr(base, name, value)
        raise AssertionError("unreachable: the last dtype either worked or raised")

    def mask_factor(self: Any, adapter_name: str) -> float:
        """What `set_scale` and the like have made of the adapter's scaling: the mask follows it."""
        initial = self.initial_scaling(adapter_name)
        return 1.0 if initial == 0 else self.scaling[adapter_name] / initial

    def initial_scaling(self: Any, adapter_name: str) -> float:
        rank = self.r[adapter_name]
        return float(self.lora_alpha[adapter_name] / (math.sqrt(rank) if self.use_rslora[adapter_name] else rank))

    def mask_rows(self: Any, adapter_name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of the mask's update, (d − 1)[:, None] ⊙ P, scaled as the adapter is: as `block_of`."""
        mask = self.lora_spec[adapter_name]
        block = self.block_of(adapter_name).detach()
        dtype = dtype or torch.promote_types(block.dtype, mask.weight.dtype)
        with align_module_device(mask):
            d_minus_1 = mask.weight.to(dtype) * self.mask_factor(adapter_name)
        return d_minus_1.reshape(*d_minus_1.shape, *[1] * (block.dim() - d_minus_1.dim())) * block.to(dtype)

    def over_all_columns(self: Any, adapter_name: str, rows: Tensor) -> Tensor:
        """`rows`, of the columns that the adapter's mask rescales, with zeros in the weight's other columns."""
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        kernel = rows.dim() - 2 - len(self._experts())
        return F.pad(rows, (0, 0) * kernel + (column, self.in_features - column - width))

    def row_selection(self: Any, adapter_name: str, like: Tensor) -> Tensor:
        """(d_out, k) of zeros and ones, in the dtype and place of `like`: puts the mask's rows in their place."""
        mask = self.lora_spec[adapter_name]
        row = mask.region(self.out_features, self.in_features)[0]
        return torch.eye(self.out_features, dtype=like.dtype, device=like.device)[:, row : row + mask.k]

    def add_mask_delta(self: Any, weight: Tensor, adapter_name: str, sign: int = 1) -> None:
        """Add the mask's update, in place, to a tensor laid out as the base weight is."""
        mask, oriented, axis = self.lora_spec[adapter_name], self._oriented(weight), len(self._experts())
        row, column, width = mask.region(*oriented.shape[axis : axis + 2])
        target = oriented.narrow(axis, row, mask.k).narrow(axis + 1, column, width)
        target += sign * self.mask_rows(adapter_name).to(weight.dtype)

    def _oriented(self: Any, weight: Tensor) -> Tensor:
        """A view of a tensor laid out as the base weight is, output dimension first."""
        return transpose(weight, getattr(self, "fan_in_fan_out", False))

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        if adapter in self.lora_spec and not self._mask_off:
            self.add_mask_delta(delta, adapter)
        return delta

    @contextmanager
    def mask_off(self) -> Iterator[None]:
        """Within, `get_delta_weight` is that of the low-rank factors alone."""
        self._mask_off = True
        try:
            yield
        finally:
            del self._mask_off

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self.merged:
            self._keep_blocks()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            self._release_blocks()

    def unmerge(self: Any) -> None:
        try:
            super().unmerge()  # type: ignore[misc]
        finally:
            self._release_blocks()

    def _keep_blocks(self: Any) -> None:
        # Merging changes the weight that Γ multiplies, so the blocks are kept from before the first merge.
        for name, mask in self.lora_spec.items():
            prepare = getattr(self.lora_variant.get(name), "prepare_weight", None)
            if prepare is not None:
                prepare(self, name)
            block = self.block_of(name)
            if mask.reads_weight:
                mask.block = block.detach().clone()

    def _release_blocks(self: Any) -> None:
        if not self.merged:
            for mask in self.lora_spec.values():
                if mask.reads_weight:
                    mask.block = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.get("adapter_names")
        x, projected = self._tap(x)
        result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self.disable_adapters or self.merged:
            return result
        if adapter_names is not None:
            for name in dict.fromkeys(adapter_names):
                if not self.masks_due([name]):
                    continue
                rows = [i for i, other in enumerate(adapter_names) if other == name]
                result[rows] = self.add_mask_term(name, x[rows], result[rows])
            return result
        for name in self.masks_due(self.active_adapters):
            result = self.add_mask_term(name, x, result, projected.get(name))
        return result

    def _tap(self: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """In training of a linear layer, P x for each mask, and x as the rest is to see it, for cheaper gradients."""
        projected: dict[str, Tensor] = {}
        if not x.requires_grad or self.disable_adapters or self.merged or self.lora_variant or not is_plain_training():
            return x, projected
        for name in self.active_adapters:
            if name in self.lora_spec:
                block = self.block_of(name)
                if block.dim() == 2:
                    column = self.lora_spec[name].region(self.out_features, self.in_features)[1]
                    x, projected[name] = TapInput.apply(x, block, column)  # type: ignore[no-untyped-call]
        return x, projected

    def masks_due(self: Any, names: list[str], before: str | None = None) -> list[str]:
        """Those of the adapters `names` whose mask's term is to be added before the adapter `before`, or in the end.

        Some LoRA variants' forward has it in it; and DoRA's scales all that the adapters before it have added.
        """
        due: list[str] = []
        for name in names:
            variant = self.lora_variant.get(name)
            if name == before:
                break
            if isinstance(variant, MaskInDora):
                due = []
            elif name in self.lora_spec and not isinstance(variant, MaskInForward):
                due.append(name)
        return due

    def add_mask_term(self: Any, name: str, x: Tensor, result: Tensor, projected: Tensor | None = None) -> Tensor:
        """Add the mask's term to `result`, in place; `projected` is P x where that is known."""
        mask, channels = self.lora_spec[name], -1
        row = mask.region(self.out_features, self.in_features)[0]
        if projected is None:
            block = self.block_of(name)
            channels = 1 - block.dim()  # before the spatial dimensions of a convolution
            projected = self.project(name, x, block)
        added: Tensor = mask(result, projected, self.mask_factor(name), row, channels)
        return added

    def project(self: Any, adapter_name: str, x: Tensor, block: Tensor) -> Tensor:
        """P applied to the layer's input: (…, k), and the spatial dimensions of a convolution's output after it."""
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        return F.linear(x.narrow(-1, column, width).to(block.dtype), block)


class SpecLoRALinear(SpecLoRALayer, lora.Linear):
    """SpecLoRA on `nn.Linear` and on transformers' `Conv1D`."""


class SpecLoRAEmbedding(SpecLoRALayer, lora.Embedding):
    """SpecLoRA on `nn.Embedding`: d rescales the first k features of the first k token ids."""

    def base_weight(self: Any) -> Tensor:
        return self.get_base_layer().weight.T

    def _oriented(self: Any, weight: Tensor) -> Tensor:
        return weight.T

    def project(self: Any, adapter_name: str, x: Tensor, block: Tensor) -> Tensor:
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        index = x - column
        inside = (index >= 0) & (index < width)
        projected = F.embedding(index.clamp(0, width - 1), block.T) * inside.unsqueeze(-1)
        embed_scale = self._get_embed_scale()
        return projected if embed_scale is None else projected * embed_scale.to(projected.dtype)


class _MaskedConv(SpecLoRALayer):
    """SpecLoRA on convolutions: d rescales the block of the first k output and input channels, the whole kernel."""

    def base_weight(self: Any) -> Tensor:
        return self.get_base_layer().weight

    def _oriented(self: Any, weight: Tensor) -> Tensor:
        return weight

    def project(self: Any, adapter_name: str, x: Tensor, block: Tensor) -> Tensor:
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        channels = 1 - block.dim()
        projected: Tensor = self.get_base_layer()._conv_forward(
            x.narrow(channels, column, width).to(block.dtype), block, None
        )
        return projected


class SpecLoRAConv1d(_MaskedConv, lora.layer.Conv1d):
    """SpecLoRA on `nn.Conv1d`."""


class SpecLoRAConv2d(_MaskedConv, lora.Conv2d):
    """SpecLoRA on `nn.Conv2d`."""


class SpecLoRAConv3d(_MaskedConv, lora.Conv3d):
    """SpecLoRA on `nn.Conv3d`."""


class _MaskMerged(SpecLoRALayer):
    """For layers of PEFT's that compute with W + ΔW: `get_delta_weight` is all they need."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(SpecLoRALayer, self).forward(*args, **kwargs)  # type: ignore[misc]


class SpecLoRAMultiheadAttention(_MaskMerged, MultiheadAttention):
    """SpecLoRA on `nn.MultiheadAttention`: on its fused input projection, and on its output projection."""

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
            out_proj._keep_blocks()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            out_proj._release_blocks()


class SpecLoRAOutProjection(SpecLoRALinear):
    """The output projection of a `MultiheadAttention`, which itself puts its update into the weight and takes it out.

    PEFT's then asks its projection to do the same once more, so that the update counts twice; this one only notes it.
    """

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [name for name in names if name in self.lora_A and name not in self.merged_adapters]

    def unmerge(self: Any) -> None:
        self.merged_adapters.clear()
        self._release_blocks()


class SpecLoRAParamWrapper(_MaskMerged, ParamWrapper):
    """SpecLoRA on a bare parameter (`target_parameters`). Experts stacked in it have a d each: (experts, k)."""

    def base_weight(self: Any) -> Tensor:
        return self._oriented(self.get_param())

    def _oriented(self: Any, weight: Tensor) -> Tensor:
        if weight.dim() < self.get_param().dim():
            return weight.unsqueeze(0)  # PEFT's update of a single expert has no dimension of experts
        return weight.transpose(-2, -1) if weight.dim() == 3 and not self._did_swap_in_out_features else weight

    def weight_is_readable(self: Any) -> bool:
        return self.get_param().dtype in _READABLE

    def _experts(self: Any) -> tuple[int, ...]:
        return (self.num_experts,) if self.get_param().dim() == 3 else ()

    def block_of(self: Any, adapter_name: str) -> Tensor:
        # A copy: the parametrization by which PEFT adds ΔW moves the parameter about between forward and backward.
        return super().block_of(adapter_name).clone()

    def compute_block(self: Any, mask: SpectralMask) -> Tensor:
        if self.weight_is_readable():
            return super().compute_block(mask)
        dequantized = self.base_weight().detach().to(torch.float32)
        return _block(dequantized, mask).clone()

    def get_delta_factors(self: Any, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """As PEFT's, the mask being k ranks more: rows picked by a selection matrix."""
        lhs, rhs, scaling = super().get_delta_factors(adapter_name)
        update = self.over_all_columns(
            adapter_name, self.mask_rows(adapter_name, dtype=lhs.dtype)
        )  # (experts, k, d_in)
        pick = self.row_selection(adapter_name, lhs).expand(*self._experts(), -1, -1)  # (experts, d_out, k)
        left, right = (pick, update) if self._did_swap_in_out_features else (update.mT, pick.mT)
        return torch.cat([lhs * scaling, left], dim=-1), torch.cat([rhs, right], dim=-2), 1.0


SpecLoRAParamWrapper.__name__ = "ParamWrapper"  # by which PEFT knows that it may wrap such a layer once more

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

# PEFT's layers over quantized bases, some of which exist only where their backend is installed.
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
    """The class that has a mask beside what PEFT's class `cls` has: itself if it has one, None where there is none."""
    if issubclass(cls, SpecLoRALayer):
        return cls
    module = _QUANTIZED.get(cls.__name__)
    if cls not in _CLASSES and module is not None and cls.__module__ == f"peft.tuners.lora.{module}":
        name = f"SpecLoRA{cls.__name__}"
        members = {"__module__": _PUBLIC, "__doc__": f"SpecLoRA on {cls.__name__}."}
        _CLASSES[cls] = type(name, (SpecLoRALayer, cls), members)
    return _CLASSES.get(cls)


def quantized_class(name: str) -> type | None:
    """The class of that name over one of PEFT's quantized layers; None where there is none, or its backend is not."""
    peft_name = name.removeprefix("SpecLoRA")
    if peft_name == name or peft_name not in _QUANTIZED:
        return None
    cls = getattr(importlib.import_module(f"peft.tuners.lora.{_QUANTIZED[peft_name]}"), peft_name, None)
    return None if cls is None else masked_class(cls)


def _block(weight: Tensor, mask: SpectralMask) -> Tensor:
    """What `mask` rescales of a weight (…, d_out, d_in, *kernel): (…, k, columns, *kernel), a view where it can be."""
    axis = mask.weight.dim() - 1
    if not mask.mode.startswith("hadamard"):
        return svd_blocks(weight.detach(), mask)
    row, column, width = mask.region(*weight.shape[axis : axis + 2])
    return weight.narrow(axis, row, mask.k).narrow(axis + 1, column, width)


@torch.no_grad()
def svd_blocks(weights: Tensor, mask: SpectralMask, stacked: int = 0) -> Tensor:
    """U_{1:k, K} Σ_K V_Kᵀ for K the k largest (svd) or smallest (svd_bottom) singular values: (…, k, d_in, *kernel).

    `weights` has `stacked` dimensions before those of one module's weight; a convolution's is taken as the matrix
    d_out × (d_in · kernel).
    """
    axis = stacked + mask.weight.dim() - 1
    matrices = weights.flatten(start_dim=axis + 1).to(torch.promote_types(weights.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    chosen = slice(0, mask.k) if mask.mode == "svd" else slice(S.shape[-1] - mask.k, None)
    block = (U[..., : mask.k, chosen] * S[..., None, chosen]) @ Vh[..., chosen, :]
    return block.reshape(*weights.shape[:axis], mask.k, *weights.shape[axis + 1 :]).to(weights.dtype)
