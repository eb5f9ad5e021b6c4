"""SpecLoRA's mask: the learnable d, the block P of the base weight that it rescales, and the arithmetic of both.

The mask adds (d − 1) ⊙ (P x) to k output channels. This file knows nothing of PEFT.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.tuners import _private

Mode = Literal["hadamard", "hadamard_bottom", "svd", "svd_bottom"]
MODES: tuple[Mode, ...] = get_args(Mode)


class SpectralMask(nn.Module):
    """The learnable part of one module's mask.

    `weight` has shape (k,), or (experts, k) for experts stacked in one parameter. It holds d − 1, so that zero means no
    change: weight decay pulls towards the identity, and half precision has its best resolution there. The parameter is
    named after the mode (`weight_svd`), so that every checkpoint says which block its d rescales.

    `block` is the frozen P where it cannot be a view of the base weight (svd modes, quantized weights). It is never
    saved.
    """

    block: Tensor | None

    def __init__(self, k: int, mode: Mode, *, experts: tuple[int, ...] = (), reads_weight: bool = True) -> None:
        super().__init__()
        self.k = k  # FSDP keeps only a shard of `weight` between its forward passes, so its shape is no source of k
        self.mode = mode
        self.reads_weight = reads_weight and mode.startswith("hadamard")
        self.parameter_name = f"weight_{mode}"
        self.register_parameter(self.parameter_name, nn.Parameter(torch.zeros(*experts, k)))
        self.register_buffer("block", None, persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        """d − 1."""
        return cast(nn.Parameter, getattr(self, self.parameter_name))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        errors: list[str] = args[-1]
        errors += [wrong_mode(key, self.mode) for key in state_dict if is_of_other_mode(key, prefix, self.mode)]

    def forward(self, result: Tensor, projected: Tensor, factor: float, row: int, channels: int = -1) -> Tensor:
        """Add factor · (d − 1) ⊙ `projected`, in place, to the k channels of `result` that begin at `row`.

        `channels` is the channel dimension of both tensors. This is the module's forward, rather than a function, so
        that accelerate's hooks bring in an offloaded d.
        """
        weight = self.weight if isinstance(factor, float) and factor == 1.0 else self.weight * factor
        weight = weight.reshape(-1, *[1] * (-1 - channels))
        if is_eager_training():
            added: Tensor = AddTerm.apply(result, projected, weight, row, channels)  # type: ignore[no-untyped-call]
            return added
        result.narrow(channels, row, self.k).add_(projected * weight)
        return result

    def region(self, d_out: int, d_in: int) -> tuple[int, int, int]:
        """First row, first column and number of columns of the rescaled block; it has k rows."""
        if self.mode == "hadamard":
            return 0, 0, self.k
        if self.mode == "hadamard_bottom":
            return d_out - self.k, d_in - self.k, self.k
        return 0, 0, d_in

    def extra_repr(self) -> str:
        return f"k={self.k}, mode={self.mode}"


def is_of_other_mode(key: str, prefix: str, mode: str) -> bool:
    """Whether a tensor of a mask, whose name begins with `prefix`, is not that of a mask of this mode."""
    return key.startswith(prefix) and key[len(prefix) :] != f"weight_{mode}"


def wrong_mode(key: str, mode: str) -> str:
    """The message for a checkpoint's tensor of another mode."""
    return (
        f"SpecLoRA: the checkpoint has {key!r}, but the adapter's `mode` is {mode!r}, with 'weight_{mode}'. "
        f"Make the adapter with the `mode` that the checkpoint was trained with."
    )


class ProjectInput(torch.autograd.Function):
    """Returns x for the rest of the layer, and P x. Its backward adds P's part to a few columns of x's gradient.

    Plain autograd would pad P's part with zeros to full width and add two full-width tensors. Adding in place is safe:
    the gradient from the rest is a sum that autograd has just made (base layer plus A), and nothing else refers to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, column: int) -> tuple[Tensor, Tensor]:
        projected = F.linear(x.narrow(-1, column, block.shape[1]).to(block.dtype), block)
        ctx.save_for_backward(block.to(projected.dtype))  # autocast chooses the dtype of `projected`
        ctx.column = column
        return x.view_as(x), projected

    @staticmethod
    def backward(ctx: Any, from_rest: Tensor, from_projected: Tensor) -> tuple[Tensor, None, None]:
        (block,) = ctx.saved_tensors
        # With create_graph the backward pass is recorded itself, and must not change its inputs.
        gradient = from_rest.clone() if torch.is_grad_enabled() else from_rest
        gradient.narrow(-1, ctx.column, block.shape[1]).add_(from_projected @ block)
        return gradient, None, None


class AddTerm(torch.autograd.Function):
    """Adds `projected` ⊙ `weight`, in place, to the channels of `result` that begin at `row`.

    Plain autograd would copy the gradient of all of `result`, as it does for every in-place change of a view.
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


def is_eager_training() -> bool:
    """Whether autograd records this computation eagerly: no compiler traces it and no `torch.func` transforms it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _private.in_functorch_transform()


def rescaled_block(weight: Tensor, mask: SpectralMask) -> Tensor:
    """The block P of a weight (…, d_out, d_in, *kernel) that `mask` rescales: (…, k, columns, *kernel).

    A view of `weight` in the hadamard modes.
    """
    axis = mask.weight.dim() - 1
    if not mask.mode.startswith("hadamard"):
        return svd_blocks(weight.detach(), mask)
    row, column, width = mask.region(*weight.shape[axis : axis + 2])
    return weight.narrow(axis, row, mask.k).narrow(axis + 1, column, width)


@torch.no_grad()
def svd_blocks(weights: Tensor, mask: SpectralMask, stacked: int = 0) -> Tensor:
    """The block P of the svd modes, U_{1:k, K} Σ_K V_Kᵀ: (…, k, d_in, *kernel).

    K are the k largest (svd) or smallest (svd_bottom) singular values. `stacked` is the number of dimensions that come
    before one module's weight. A convolution's weight counts as a matrix d_out × (d_in · kernel).
    """
    axis = stacked + mask.weight.dim() - 1
    matrices = weights.flatten(start_dim=axis + 1).to(torch.promote_types(weights.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    chosen = slice(0, mask.k) if mask.mode == "svd" else slice(S.shape[-1] - mask.k, None)
    block = (U[..., : mask.k, chosen] * S[..., None, chosen]) @ Vh[..., chosen, :]
    return block.reshape(*weights.shape[:axis], mask.k, *weights.shape[axis + 1 :]).to(weights.dtype)
