"""A base model that is given back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorakit._signals import restoring
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._private import own_parameters, restore_parameters
from lorakit.tuners._base import changes_base
from lorakit.tuners.module_tree import module_tree, restore


@restoring
def preserved_base(model: nn.Module, config: PeftConfig | None) -> Iterator[None]:
    """Undo whatever PEFT and a training do to a base model: the adapters, and changes to the model's own tensors.

    Buffers are copied, and biases if `config` trains them. All parameters are copied only if the config's
    initialization changes them.
    Raises: UnsupportedModelError for a model that already has adapters.
    """
    check_no_adapters(model)
    trains_bias = getattr(config, "bias", "none") != "none"
    changes = config is not None and changes_base(config)
    tree = module_tree(model)
    own = [(module, own_parameters(module), set(vars(module))) for module in model.modules()]
    settings: Any = getattr(getattr(model, "config", None), "__dict__", {})
    settings_before = dict(settings)
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    copies = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        if changes or (trains_bias and name.rpartition(".")[2] == "bias"):
            copies[parameter] = parameter.detach().to("cpu", copy=True)
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None  # a bias that is trained must not start with an old gradient
        yield
    finally:
        restore(tree)
        for module, its_parameters, attributes in own:
            for attribute in set(vars(module)) - attributes:
                delattr(module, attribute)
            restore_parameters(module, its_parameters)
        settings.clear()
        settings.update(settings_before)
        with torch.no_grad():
            for parameter, gradient, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            for tensor, values in copies.items():
                tensor.copy_(values)


def check_no_adapters(model: nn.Module) -> None:
    """Raises: UnsupportedModelError for a model that already has adapters."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "`model` must be a base model, since each run attaches an adapter of its own; this one has adapters. Pass "
            "model.unload(), or the model that the adapters were attached to."
        )
