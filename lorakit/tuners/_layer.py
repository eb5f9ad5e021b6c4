"""The mixin that gives a LoRA layer of PEFT SpecLoRA's mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._signals import restoring
from lorakit.tuners import _private
from lorakit.tuners._mask import Mode, ProjectInput, SpectralMask, is_eager_training, rescaled_block
from lorakit.tuners._variants import MaskInDora, MaskInForward, masked_variant

READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of weights that are not quantized


class SpecLoRALayer:
    """What SpecLoRA adds to a LoRA layer of PEFT.

    Weights are oriented (output, input) here, whatever the layer stores: (features, token ids) for an embedding,
    (output channels, input channels, *kernel) for a convolution, and (experts, output, input) for stacked experts.

    The class does not derive from LoraLayer. A layer that PEFT has made becomes a masked one by a change of its class,
    and Python allows that only between classes of one memory layout.
    """

    lora_spec: nn.ModuleDict
    _mask_off = False

    def add_mask(self: Any, adapter_name: str, k: int, mode: Mode) -> None:
        """Give an adapter of this layer a mask with d = 1; k is clipped to the weight's smaller side."""
        if "lora_spec" not in _private.children(self):
            self.lora_spec = nn.ModuleDict()
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_spec")
        self.lora_spec[adapter_name] = SpectralMask(
            min(k, self.in_features, self.out_features),
            mode,
            experts=self.stacked_experts(),
            reads_weight=self.weight_is_readable(),
        )
        _private.move_adapter_to_base_device(self, adapter_name)
        variant = self.lora_variant.get(adapter_name)
        if variant is not None:
            self.lora_variant[adapter_name] = masked_variant(variant)
            if self.initial_scaling(adapter_name) == 0 and isinstance(self.lora_variant[adapter_name], MaskInForward):
                raise ValueError(
                    "SpecLoRA does not support `lora_alpha=0` together with DoRA or activated LoRA; got both. Set "
                    "`lora_alpha` to a positive number."
                )

    # --- the base weight, and the block of it that the mask rescales

    def base_weight(self: Any) -> Tensor:
        """The frozen weight, oriented (output, input): a view."""
        return transpose(self.get_base_layer().weight, getattr(self, "fan_in_fan_out", False))

    def oriented(self: Any, weight: Tensor) -> Tensor:
        """A view, oriented (output, input), of a tensor that is stored as the base weight is."""
        return transpose(weight, getattr(self, "fan_in_fan_out", False))

    def stacked_experts(self) -> tuple[int, ...]:
        """The shape of the experts' dimension: (experts,) for stacked experts, and () for all other layers."""
        return ()

    def weight_is_readable(self: Any) -> bool:
        """Whether the base weight is a plain floating-point tensor, not a quantized one."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return type(weight) is nn.Parameter and weight.dtype in READABLE

    def base_is_ready(self: Any, adapter_name: str) -> bool:
        """Whether the base weight has its values, after any change that the adapter's initialization makes to it."""
        if any(parameter.is_meta for parameter in self.get_base_layer().parameters()):
            return False
        return not _private.awaits_kasa_truncation(self, adapter_name)

    def block_of(self: Any, adapter_name: str) -> Tensor:
        """The block P that the adapter's d rescales, (k, columns): a view of the base weight where possible."""
        mask = self.lora_spec[adapter_name]
        if mask.block is not None:
            return mask.block
        if mask.reads_weight:
            weight = self.base_weight()
            if not weight.is_meta:
                return rescaled_block(weight, mask)
        with align_module_device(self.get_base_layer()):  # brings in an offloaded weight once; the block stays
            block = self.compute_block(mask)
        if not block.is_meta:
            mask.block = block
        return block

    @torch.no_grad()
    def compute_block(self: Any, mask: SpectralMask) -> Tensor:
        """A copy of the block that `mask` rescales, from the base weight as it is now."""
        if self.weight_is_readable():
            return rescaled_block(self.base_weight().detach(), mask).clone()
        row, column, width = mask.region(self.out_features, self.in_features)
        columns = dequantized_columns(self.get_base_layer(), self.in_features, column, width)
        if not mask.mode.startswith("hadamard"):
            return rescaled_block(columns, mask)
        return columns[row : row + mask.k].clone()

    # --- the mask's update of the weight

    def mask_factor(self: Any, adapter_name: str) -> float:
        """By how much `set_scale` and the like have changed the adapter's scaling: the mask follows it."""
        initial = self.initial_scaling(adapter_name)
        return 1.0 if initial == 0 else self.scaling[adapter_name] / initial

    def initial_scaling(self: Any, adapter_name: str) -> float:
        """The scaling that the adapter's alpha and rank mean."""
        rank = self.r[adapter_name]
        return float(self.lora_alpha[adapter_name] / (math.sqrt(rank) if self.use_rslora[adapter_name] else rank))

    def mask_rows(self: Any, adapter_name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The nonzero part of the mask's update, factor · (d − 1)[:, None] ⊙ P, in the shape of P."""
        mask = self.lora_spec[adapter_name]
        block = self.block_of(adapter_name).detach()
        dtype = dtype or torch.promote_types(block.dtype, mask.weight.dtype)
        with align_module_device(mask):
            d_minus_1 = mask.weight.to(dtype) * self.mask_factor(adapter_name)
        return d_minus_1.reshape(*d_minus_1.shape, *[1] * (block.dim() - d_minus_1.dim())) * block.to(dtype)

    def over_all_columns(self: Any, adapter_name: str, rows: Tensor) -> Tensor:
        """`rows` of the block, padded with zeros to all input columns of the weight."""
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        kernel = rows.dim() - 2 - len(self.stacked_experts())
        return F.pad(rows, (0, 0) * kernel + (column, self.in_features - column - width))

    def row_selection(self: Any, adapter_name: str, like: Tensor) -> Tensor:
        """The 0/1 matrix (d_out, k) that puts the block's rows into place, in the dtype and on the device of `like`."""
        mask = self.lora_spec[adapter_name]
        row = mask.region(self.out_features, self.in_features)[0]
        return torch.eye(self.out_features, dtype=like.dtype, device=like.device)[:, row : row + mask.k]

    def add_mask_delta(self: Any, weight: Tensor, adapter_name: str, sign: int = 1) -> None:
        """Add the mask's update, in place, to a tensor that is stored as the base weight is."""
        mask, oriented, axis = self.lora_spec[adapter_name], self.oriented(weight), len(self.stacked_experts())
        row, column, width = mask.region(*oriented.shape[axis : axis + 2])
        target = oriented.narrow(axis, row, mask.k).narrow(axis + 1, column, width)
        target += sign * self.mask_rows(adapter_name).to(weight.dtype)

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        if adapter in self.lora_spec and not self._mask_off:
            self.add_mask_delta(delta, adapter)
        return delta

    @restoring
    def mask_off(self) -> Iterator[None]:
        """Make `get_delta_weight` return the low-rank factors' update alone."""
        self._mask_off = True
        try:
            yield
        finally:
            del self._mask_off

    # --- merging

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self.merged:
            self.keep_blocks()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            self.release_blocks()

    def unmerge(self: Any) -> None:
        try:
            super().unmerge()  # type: ignore[misc]
        finally:
            self.release_blocks()

    def keep_blocks(self: Any) -> None:
        """Copy the blocks before the first merge, which changes the weight that they are views of."""
        for name, mask in self.lora_spec.items():
            prepare = getattr(self.lora_variant.get(name), "prepare_weight", None)
            if prepare is not None:
                prepare(self, name)
            block = self.block_of(name)
            if mask.reads_weight:
                mask.block = block.detach().clone()

    def release_blocks(self: Any) -> None:
        """Drop the copies of the blocks once nothing is merged."""
        if not self.merged:
            for mask in self.lora_spec.values():
                if mask.reads_weight:
                    mask.block = None

    # --- the forward pass

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.get("adapter_names")
        x, projected = self._project_early(x)
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

    def _project_early(self: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """P x of each active mask, and the x to use from there on, whose gradient is cheaper. See `ProjectInput`.

        Only while a linear layer trains; elsewhere there is nothing to save, and nothing is projected here.
        """
        projected: dict[str, Tensor] = {}
        if not x.requires_grad or self.disable_adapters or self.merged or self.lora_variant or not is_eager_training():
            return x, projected
        for name in self.active_adapters:
            if name in self.lora_spec:
                block = self.block_of(name)
                if block.dim() == 2:
                    column = self.lora_spec[name].region(self.out_features, self.in_features)[1]
                    x, projected[name] = ProjectInput.apply(x, block, column)  # type: ignore[no-untyped-call]
        return x, projected

    def masks_due(self: Any, names: list[str], before: str | None = None) -> list[str]:
        """The adapters among `names` whose mask term is still to be added, before the adapter `before` or at the end.

        The forward of some LoRA variants adds the term itself, and DoRA's rescales everything that the adapters before
        it have added, their mask terms included.
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
        """Add the mask's term to `result`, in place; `projected` is P x where it has been computed already."""
        mask, channels = self.lora_spec[name], -1
        row = mask.region(self.out_features, self.in_features)[0]
        if projected is None:
            block = self.block_of(name)
            channels = 1 - block.dim()  # before the spatial dimensions of a convolution
            projected = self.project(name, x, block)
        added: Tensor = mask(result, projected, self.mask_factor(name), row, channels)
        return added

    def project(self: Any, adapter_name: str, x: Tensor, block: Tensor) -> Tensor:
        """P applied to the layer's input: (…, k), with a convolution's spatial dimensions after the k channels."""
        _, column, width = self.lora_spec[adapter_name].region(self.out_features, self.in_features)
        return F.linear(x.narrow(-1, column, width).to(block.dtype), block)


def dequantized_columns(base: Any, d_in: int, column: int, width: int) -> Tensor:
    """Columns of a quantized base layer's weight, (d_out, width): its output for unit vectors, without the bias.

    These are the values that the kernel computes with, whatever the format, and nothing is dequantized for good.
    """
    tensors = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
    device = tensors[0].device if tensors else base.device
    candidates = [
        getattr(base, "compute_dtype", None),
        getattr(getattr(base, "bias", None), "dtype", None),
        *(torch.float32, torch.float16, torch.bfloat16),
    ]
    floating = [dtype for dtype in candidates if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    with _without_bias(base):
        for dtype in dict.fromkeys(floating):
            units = torch.zeros(width, d_in, dtype=dtype, device=device)
            units.diagonal(offset=column).fill_(1)
            # An input that needs no gradient would make bitsandbytes repack its weight for inference, for good.
            units.requires_grad_()
            try:
                columns: Tensor = base(units).T
            except (RuntimeError, ValueError, TypeError, AssertionError):  # the kernel does not take this dtype
                if dtype == floating[-1]:
                    raise
            else:
                return columns
    raise AssertionError("unreachable: the last dtype either worked or raised")


@restoring
def _without_bias(base: Any) -> Iterator[None]:
    """Take a layer's bias away for a while, and have bitsandbytes forget the dtype of the inputs it sees meanwhile."""
    bias = getattr(base, "bias", None)
    # In the registry, not by assignment: PEFT's low_cpu_mem_usage would move an assigned bias to the meta device.
    holders = [registry for registry in _private.registries(base) if registry.get("bias") is not None]
    kept = {name: getattr(base, name) for name in ("compute_dtype", "compute_type_is_set") if hasattr(base, name)}
    try:
        for holder in holders:
            holder["bias"] = None
        yield
    finally:
        for holder in holders:
            holder["bias"] = bias
        for name, value in kept.items():
            setattr(base, name, value)
