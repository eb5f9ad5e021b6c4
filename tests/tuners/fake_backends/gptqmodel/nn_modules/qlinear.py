"""As gptqmodel's layers look to PEFT: packed 4-bit weights and float16 scales; any input, computed in float16."""

from enum import Enum

import torch
from torch import nn


class METHOD(str, Enum):  # noqa: UP042
    GPTQ = "gptq"
    AWQ = "awq"


class BaseQuantLinear(nn.Module):
    SUPPORTS_METHODS = (METHOD.GPTQ,)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().T
        scales = weight.abs().amax(0) / 7
        codes = (weight / scales).round().to(torch.int32) + 8
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        self.register_buffer("shifts", shifts)
        self.register_buffer("qweight", (codes.reshape(-1, 8, self.out_features) << shifts[:, None]).sum(1).int())
        self.register_buffer("scales", scales.half())
        self.register_buffer("bias", linear.bias.detach().half())

    def hidden_weight(self) -> torch.Tensor:
        """(out_features, in_features)."""
        codes = (self.qweight[:, None] >> self.shifts[:, None]) & 15
        return ((codes.flatten(0, 1) - 8) * self.scales).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.half() @ self.hidden_weight().T
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class AwqQuantLinear(BaseQuantLinear):
    SUPPORTS_METHODS = (METHOD.AWQ,)
