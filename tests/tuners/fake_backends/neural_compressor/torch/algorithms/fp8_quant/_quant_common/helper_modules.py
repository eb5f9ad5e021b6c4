"""As Intel Neural Compressor's layers look to PEFT: a float8 weight and its scale."""

import torch
from torch import nn
from torch.nn import functional as F


class PatchedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale_weight", scale)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def hidden_weight(self) -> torch.Tensor:
        """(out_features, in_features)."""
        return self.weight.float() * self.scale_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.hidden_weight(), self.bias).to(x.dtype)
