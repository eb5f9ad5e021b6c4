"""As eetq's layers look to PEFT: an int8 weight, transposed, under the name `weight`; a kernel for float16 alone."""

import torch
from torch import nn


class EetqLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().T
        scales = weight.abs().amax(0) / 127
        self.weight = nn.Parameter((weight / scales).round().to(torch.int8), requires_grad=False)
        self.register_buffer("weight_scales", scales.half())
        self.bias = nn.Parameter(linear.bias.detach().half())

    def hidden_weight(self) -> torch.Tensor:
        """(out_features, in_features)."""
        return (self.weight * self.weight_scales).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float16:
            raise RuntimeError("w8_a16_gemm expects float16")
        y = x @ self.hidden_weight().T
        return y if self.bias is None else y + self.bias
