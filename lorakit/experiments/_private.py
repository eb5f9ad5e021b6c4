"""Private names of PEFT and torch that this package uses, one small function each.

tests/experiments/test_private.py checks them and names the version that breaks one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorakit._signals import restoring


def adapter_names(layer: BaseTunerLayer) -> list[str]:
    """The names of all adapters of an adapted layer."""
    return list(layer._all_available_adapter_names())


def trained_copies(wrapper: Any) -> set[str]:
    """The names of the adapters that train a copy of a module in full (modules_to_save, trainable tokens)."""
    return set(wrapper._get_available_adapters())


@restoring
def preserved_switches(layers: Iterable[BaseTunerLayer]) -> Iterator[None]:
    """Restore which layers have their adapters switched on."""
    states = [(layer, layer._disable_adapters) for layer in layers]
    try:
        yield
    finally:
        for layer, disabled in states:
            layer._disable_adapters = disabled


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, as they are now."""
    return dict(module._parameters)


def restore_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """Give a module exactly these parameters of its own."""
    module._parameters.clear()
    module._parameters.update(parameters)


def auxiliary_losses(tuner: Any) -> list[Any]:
    """Terms of the loss that PEFT leaves to the training loop, of the methods that this PEFT has (KaSA, MonteCLoRA)."""
    terms = (getattr(tuner, name, None) for name in ("_get_kasa_loss", "_get_monteclora_loss"))
    return [term() for term in terms if term is not None]
