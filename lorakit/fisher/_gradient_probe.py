"""Per-example gradients of lora_B, from one forward and backward pass of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from einops import einsum, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._distributed.fsdp import full_tensor
from lorakit._signals import restoring
from lorakit.adapters.in_model import LiveModule, read_weight
from lorakit.errors import CalibrationError, UnsupportedModelError
from lorakit.fisher._mask_ladder import MaskLadder


class LoraBGradientProbe(nn.Module):
    """Replaces lora_B during a pass: computes the same output, and measures each example's gradients in backward.

    Its statistic is (n, k), with one row an example: the root mean square of the gradient of B's entries; of A's
    entries, if "A" is in `factors`; the norms of the rows and of the columns of W's gradient, if "weight" is; and the
    norms of the gradient of SpecLoRA's d, for each k of `ladder`. Each is proportional to the gradient, as a
    calibration pass needs it.
    """

    def __init__(self, module: LiveModule, factors: set[str], ladder: MaskLadder | None = None) -> None:
        super().__init__()
        up = module.up
        self.weight = read_weight(up)
        bias = getattr(up, "bias", None)
        if bias is not None and bias.is_meta:
            raise UnsupportedModelError(f"{module.name!r} has an offloaded `lora_bias`, which the probe cannot read.")
        self.bias = None if bias is None else full_tensor(bias.detach())
        self.scaling = module.scaling
        self.d_in = int(cast(Any, module.down).weight.shape[1])
        self.factors = factors
        self.ladder = ladder
        # An output that is always 0 needs no product, and no gradient flows back through it.
        self.is_zero = self.bias is None and not bool(self.weight.any())
        self.begin(one_example=False)

    def begin(self, *, one_example: bool) -> None:
        """Forget the last batch; `one_example` says that the next forward pass has only one example."""
        self.one_example = one_example
        self.separable = True
        self.ran_without_grad = False
        self.calls = 0
        self.input: Tensor | None = None
        self.sizes: set[int] = set()
        self.gradients: dict[str, Tensor] = {}
        self.statistic: Tensor | None = None

    def forward(self, a: Tensor) -> Tensor:
        """lora_B's output for a = A x."""
        d_out = self.weight.shape[0]
        if not torch.is_grad_enabled():
            self.ran_without_grad = True
            return F.linear(a, self.weight, self.bias)
        x, self.input = self.input, None
        self.calls += 1
        n = 1 if self.one_example or a.ndim == 1 else a.shape[0]
        if not self.one_example:
            # The first dimension must be the examples. With two dimensions it may be the tokens of all examples, and
            # if the first two are equal, time may come first.
            self.separable &= n == 1 or (a.ndim >= 3 and a.shape[1] != n)
        self.sizes.add(n)
        zero = a.new_zeros(()).expand(*a.shape[:-1], d_out)
        out = zero if self.is_zero else F.linear(a, self.weight, self.bias)
        kept = a.detach()
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        cast(Any, out).register_hook(lambda gradient: self._receive(n, kept, x, gradient))
        return out

    @torch.no_grad()
    def _receive(self, n: int, a: Tensor, x: Tensor | None, gradient: Tensor) -> None:
        """Turn the gradient of lora_B's output into those of B, A and W, for each of n examples."""
        if not self.separable:
            return
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        a, delta = (t.reshape(n, -1, t.shape[-1]).to(dtype) for t in (a, gradient))
        found = {"B": einsum(delta, a, "n token out, n token r -> n out r")}
        if x is not None:
            x = x.reshape(n, -1, x.shape[-1]).to(dtype)
            if "A" in self.factors:
                back = einsum(delta, self.weight.to(dtype), "n token out, out r -> n token r")
                found["A"] = einsum(back, x, "n token r, n token d -> n r d")
            if "weight" in self.factors:
                found["x"], found["delta"] = x, delta / self.scaling
            if self.ladder is not None:
                found["mask"] = self.ladder.gradients(x, delta / self.scaling)
        for name, value in found.items():
            known = self.gradients.get(name)
            if known is not None:  # a module that runs twice: gradients add up before they are squared
                value = torch.cat([known, value], dim=1) if name in ("x", "delta") else known + value
            self.gradients[name] = value
        if self.calls == 1 and not self.ran_without_grad:
            self.statistic, self.gradients = self._reduced(), {}

    def _reduced(self) -> Tensor:
        parts = []
        for name in ("B", "A"):
            if name in self.factors:
                gradient = self.gradients[name]
                entries = gradient.shape[1] * gradient.shape[2]
                parts.append(torch.linalg.vector_norm(gradient, dim=(1, 2)).unsqueeze(1) / math.sqrt(entries))
        if "weight" in self.factors:
            x, delta = self.gradients["x"], self.gradients["delta"]
            for left, right in ((delta, x), (x, delta)):
                gram = einsum(right, right, "n t d, n s d -> n t s")
                squares = reduce(einsum(gram, left, "n t s, n s d -> n t d") * left, "n t d -> n d", "sum")
                parts.append(squares.clamp(min=0).sqrt())
        if self.ladder is not None:
            parts.append(self.ladder.norms(self.gradients["mask"]))
        return torch.cat(parts, dim=1)

    def collect(self, num_examples: int) -> Tensor | None:
        """The statistic (num_examples, k) after backward; None if examples could not be told apart."""
        if self.ran_without_grad and not self.calls:
            raise CalibrationError(
                "An adapted module ran without gradients, so its Fisher information cannot be measured. If the model "
                "uses reentrant gradient checkpointing, switch it to use_reentrant=False."
            )
        if not self.separable or not self.sizes <= {num_examples}:
            return None
        if self.gradients:
            self.statistic, self.gradients = self._reduced(), {}
        if self.statistic is None:  # the module did not run, or its output does not reach the loss
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return self.weight.new_zeros(num_examples, sum(self.widths), dtype=dtype)
        return self.statistic

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns of the statistic: for B, A, the rows and columns of W, and the ladder, 0 where not asked for."""
        rows, columns = (self.weight.shape[0], self.d_in) if "weight" in self.factors else (0, 0)
        return 1, int("A" in self.factors), rows, columns, 0 if self.ladder is None else len(self.ladder.ks)


@restoring
def probed(module: LiveModule, factors: set[str], ladder: MaskLadder | None = None) -> Iterator[LoraBGradientProbe]:
    """Replace a module's lora_B by a probe while the block runs."""
    layer, name = module.layer, module.adapter_name
    up, down = layer.lora_B[name], module.down
    probe = LoraBGradientProbe(module, factors, ladder)
    handle = None

    def see_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        probe.input = arguments[0].detach()

    try:
        if factors - {"B"} or ladder is not None:
            handle = down.register_forward_pre_hook(see_input)
        layer.lora_B[name] = probe
        yield probe
    finally:
        layer.lora_B[name] = up
        if handle is not None:
            handle.remove()
