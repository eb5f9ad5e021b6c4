"""A model's state around a pass: flags, modes, active adapters and random number generators are given back."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# Where PEFT keeps which adapters are active.
_ACTIVE_ADAPTER: dict[type, str] = {
    BaseTunerLayer: "_active_adapter",
    AuxiliaryTrainingWrapper: "_active_adapter",
    BaseTuner: "active_adapter",
    PeftModel: "active_adapter",
}


def base_model_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: Any) -> torch.device | None:
    """Where the model wants its inputs; None where its weights are offloaded and accelerate's hooks move them."""
    embeddings = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has them, or says so
        embeddings = model.get_input_embeddings()
    parameter = next((embeddings or model).parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


@contextlib.contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was: gradient flags, train or eval mode of each module, active adapters, `use_cache`.

    A key-value cache is of no use to a pass with gradients, so it is switched off inside.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    adapters = [
        (module, name, copy.copy(getattr(module, name)))
        for module in model.modules()
        for kind, name in _ACTIVE_ADAPTER.items()
        if isinstance(module, kind)
    ]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache:
            config.use_cache = False
        yield
    finally:
        if use_cache:
            config.use_cache = use_cache
        for module, name, active in adapters:
            setattr(module, name, active)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def activated(adapter: PeftModel, adapter_name: str) -> Iterator[None]:
    """Make the adapter take part in the forward pass, alone if it does not already."""
    if adapter_name in adapter.active_adapters:
        yield
        return
    with preserved_state(adapter):
        adapter.set_adapter(adapter_name)
        yield


@contextlib.contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """Give torch's (on the CPU and the model's devices), numpy's and Python's generators back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    used = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    device_type = next(iter(used)).type if used else "cuda"
    try:
        with torch.random.fork_rng(devices=[device.index for device in used], device_type=device_type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
