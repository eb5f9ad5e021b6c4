"""The singular value decomposition of a module's update, run in the place of its factors during a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._distributed.fsdp import full_tensor
from lorakit._signals import restoring
from lorakit.adapters.in_model import LiveModule
from lorakit.errors import CalibrationError, SurgeryError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapted module with the thin SVD of its ΔW: U (d_out, m), S (m,), Vh (m, d_in), m = min(r, d_out, d_in)."""

    module: LiveModule
    U: Tensor
    S: Tensor
    Vh: Tensor


def decompose(module: LiveModule) -> Decomposed:
    """A module's update, decomposed.

    Raises: SurgeryError if its factors are not finite.
    """
    factors = module.factors()
    if not (bool(factors.A.isfinite().all()) and bool(factors.B.isfinite().all())):
        raise SurgeryError(
            f"The factors of {module.name!r} have NaN or infinite entries. Check the adapter's training."
        )
    return Decomposed(module, *factors.svd())


class SingularValueProbe(nn.Module):
    """Replaces lora_A: computes σ_k (v_k · x) for each token, with a copy of σ for each example.

    The copies are the only tensors that get a gradient: row i is example i's ∂ℓ/∂σ.
    """

    def __init__(self, Vh: Tensor, singular_values: Tensor) -> None:
        super().__init__()
        self.weight = Vh
        self.singular_values = singular_values
        self.begin(one_example=False)

    def begin(self, *, one_example: bool) -> None:
        """Forget the last batch; `one_example` says that the next forward pass has only one example."""
        self.one_example = one_example
        self.copies: list[Tensor] = []
        self.separable = True
        self.ran_without_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """σ (Vh x), for x (..., d_in)."""
        projected = F.linear(x, self.weight)
        if not torch.is_grad_enabled():
            self.ran_without_grad = True
            return projected * self.singular_values.to(projected.dtype)
        n = 1 if self.one_example or x.ndim == 1 else x.shape[0]
        copy = self.singular_values.repeat(n, 1).requires_grad_()
        self.copies.append(copy)
        if not self.one_example:
            # The first dimension must be the examples. With two dimensions it may be the tokens of all examples, and
            # if the first two are equal, time may come first.
            self.separable &= n == 1 or (x.ndim >= 3 and x.shape[1] != n)
        return projected * copy.view(n, *[1] * (projected.ndim - 2), copy.shape[1]).to(projected.dtype)

    def collect(self, num_examples: int) -> Tensor | None:
        """∂ℓ/∂σ (num_examples, m) after backward; None if examples could not be told apart."""
        if self.ran_without_grad and not self.copies:
            raise CalibrationError(
                "An adapted module ran without gradients, so its sensitivity cannot be measured. If the model uses "
                "reentrant gradient checkpointing, switch it to use_reentrant=False."
            )
        copies, self.copies = self.copies, []
        if not self.separable or any(copy.shape[0] != num_examples for copy in copies):
            return None
        gradients = [copy.grad for copy in copies if copy.grad is not None]
        if not gradients:
            return self.singular_values.new_zeros(num_examples, self.singular_values.shape[0])
        return torch.stack(gradients).sum(0)


class _ScaledU(nn.Module):
    """Replaces lora_B: U / scaling, since the layer multiplies by the scaling afterwards, and the adapter's bias."""

    def __init__(self, U: Tensor, scaling: float, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = U / scaling
        self.bias = bias

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.weight, self.bias)


@restoring
def probed(item: Decomposed) -> Iterator[SingularValueProbe]:
    """Replace a module's factors by its decomposition while the block runs.

    Raises: UnsupportedModelError if the adapter's bias is offloaded.
    """
    layer, name = item.module.layer, item.module.adapter_name
    down, up = layer.lora_A[name], layer.lora_B[name]
    bias = getattr(up, "bias", None)
    if bias is not None and bias.is_meta:
        raise UnsupportedModelError(f"{item.module.name!r} has an offloaded `lora_bias`, which surgery cannot read.")
    probe = SingularValueProbe(item.Vh, item.S)
    try:
        layer.lora_A[name] = probe
        layer.lora_B[name] = _ScaledU(item.U, item.module.scaling, None if bias is None else full_tensor(bias.detach()))
        yield probe
    finally:
        layer.lora_A[name] = down
        layer.lora_B[name] = up
