"""Private names of torch that this package reads, one small function each; tests/lens/test_private.py watches them."""

from __future__ import annotations

from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile compiled the model or a module in it; such modules ignore hooks that are added later."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
