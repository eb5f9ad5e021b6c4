"""Per-example gradients of SpecLoRA's d for several k at once.

With δ_t the gradient of a module's output and x_t its input, ∂ℓ/∂d_i = Σ_t δ_ti (P_k x_t)_i. It holds at any d, because
the module is linear in d. P_k is W[:k, :k] in the hadamard mode, and the first k rows of the best rank-k approximation
U_k Σ_k V_kᵀ in the svd mode. Both are sums over the first k columns c of L_ic y_tc: with L = W and y = x, or with L = U
and y = Σ Vᵀ x. So the steps of a ladder of k share their work. The bottom modes run from the last rows and columns.

Reference: Si et al., "Weight Spectra Induced Efficient Model Adaptation", 2025, section 4 (Eq. 4–8, Table 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from lorakit._distributed.fsdp import full_tensor
from lorakit.errors import UnsupportedModelError
from lorakit.tuners._layer import SpecLoRALayer, dequantized_columns
from lorakit.tuners._mask import Mode


class MaskLadder:
    """The gradients of d of one module, for each k of a ladder that fits its weight.

    `weight` is (d_out, d_in), oriented as in `nn.Linear`.
    """

    def __init__(self, weight: Tensor, mode: Mode, ladder: Sequence[int]) -> None:
        side = min(weight.shape)
        self.mode = mode
        self.ks = tuple(dict.fromkeys(min(k, side) for k in sorted(ladder)))
        largest = self.ks[-1]
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.right: Tensor | None = None
        if mode == "hadamard":
            left = weight[:largest, :largest]
        elif mode == "hadamard_bottom":
            left = weight[-largest:, -largest:].flip(0, 1)
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            chosen = torch.arange(side, device=weight.device)
            chosen = chosen[:largest] if mode == "svd" else chosen.flip(0)[:largest]
            left, self.right = U[:largest, chosen], S[chosen, None] * Vh[chosen]
        self.left = left.clone()  # the whole weight need not stay

    def gradients(self, x: Tensor, delta: Tensor) -> Tensor:
        """∂ℓ/∂d of each example and k: (n, len(ks), largest k), with zeros from i = k on.

        `x` is (n, tokens, d_in), `delta` (n, tokens, d_out). In the bottom mode i counts from the last row on.
        """
        largest = self.ks[-1]
        if self.mode == "hadamard_bottom":
            rows, y = delta[..., -largest:].flip(-1), x[..., -largest:].flip(-1)
        else:
            rows, y = delta[..., :largest], x[..., :largest] if self.right is None else F.linear(x, self.right)
        found = rows.new_zeros(len(x), len(self.ks), largest)
        product = torch.zeros_like(rows)
        for step, (before, k) in enumerate(pairwise((0, *self.ks))):
            product += F.linear(y[..., before:k], self.left[:, before:k])
            found[:, step, :k] = einsum(rows[..., :k], product[..., :k], "n t k, n t k -> n k")
        return found

    def norms(self, gradients: Tensor) -> Tensor:
        """The norm over i of each example's gradient, for each k: (n, len(ks)). Its square belongs to S(k)."""
        return torch.linalg.vector_norm(gradients, dim=-1)


def oriented_weight(layer: Any, name: str) -> Tensor:
    """The base weight of a linear layer of PEFT's LoRA, (d_out, d_in); a quantized one dequantized.

    Raises: UnsupportedModelError if the weight is offloaded.
    """
    base = layer.get_base_layer()
    if any(parameter.is_meta for parameter in base.parameters()):
        raise UnsupportedModelError(f"{name!r} has an offloaded weight, which the probe of masks cannot read.")
    with torch.no_grad():
        if SpecLoRALayer.weight_is_readable(layer):
            return SpecLoRALayer.oriented(layer, full_tensor(base.weight.detach()))
        return dequantized_columns(base, layer.in_features, 0, layer.in_features)
