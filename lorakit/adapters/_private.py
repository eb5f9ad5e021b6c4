"""The private names of torch, PEFT and accelerate that `lorakit.adapters` uses, each in one function.

tests/adapters/test_private.py says which version of which library breaks one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lorakit._signals import restoring

# Submodules that torch's activation checkpointing, torch.compile and FSDP put around a module, as parts of names.
COMPILED = "_orig_mod"
CHECKPOINTED = "_checkpoint_wrapped_module"


def adapter_names(layer: Any) -> set[str]:
    """The names of all adapters that a layer of PEFT's holds."""
    return set(layer._all_available_adapter_names())


def set_offloaded_weights(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights that accelerate keeps on the CPU for a module whose own are on the meta device."""
    module._hf_hook.weights_map = weights


@restoring
def restored_parameters(module: nn.Module) -> Iterator[None]:
    """Give a module back the parameter objects that it had before the block."""
    before = dict(module._parameters)
    try:
        yield
    finally:
        module._parameters.update(before)
