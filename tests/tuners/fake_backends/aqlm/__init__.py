"""As aqlm's layers look to PEFT: codes into a codebook of vectors of 8 inputs; here in bfloat16, and no cast of x."""

import torch
from torch import nn
from torch.nn import functional as F


class QuantizedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        vectors = linear.weight.detach().reshape(-1, 8)
        codes = torch.arange(len(vectors)).reshape(self.out_features, -1, 1).to(torch.int16)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebooks = nn.Parameter(vectors[None, :, None].to(torch.bfloat16))
        self.scales = nn.Parameter(torch.ones(self.out_features, 1, 1, 1, dtype=torch.bfloat16))
        self.bias = nn.Parameter(linear.bias.detach().to(torch.bfloat16))

    def hidden_weight(self) -> torch.Tensor:
        """(out_features, in_features)."""
        vectors = self.codebooks[0, self.codes[..., 0].long(), 0] * self.scales[..., 0]
        return vectors.reshape(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.hidden_weight(), self.bias)
