"""A model's state around a pass: flags, modes, active adapters and random number generators are restored."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from lorakit._signals import restoring
from lorakit.calibration import _private
from lorakit.errors import CalibrationError


def base_model_of(model: Any) -> Any:
    """The model inside a PeftModel; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: Any) -> torch.device | None:
    """The device that inputs belong on; None if the weights are offloaded, since accelerate's hooks move inputs."""
    embeddings = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # some models have none, or do not implement this
        embeddings = model.get_input_embeddings()
    parameter = next((embeddings or model).parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


def check_can_differentiate(model: nn.Module) -> None:
    """Raises: CalibrationError if the model's parameters or buffers are inference tensors."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    name = next((name for name, tensor in named if tensor.is_inference()), None)
    if name is not None:
        raise CalibrationError(
            f"The model was made under torch.inference_mode(): {name!r} is an inference tensor, through which no "
            f"gradient can flow. Load the model outside of inference mode, or under torch.no_grad()."
        )


@restoring
def no_inference_mode() -> Iterator[None]:
    """Leave torch.inference_mode(), in which nothing can be differentiated; gradients stay on or off as they are."""
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


@restoring
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore a model afterwards: `requires_grad`, train or eval mode, active adapters, `use_cache`.

    Inside, `use_cache` is off: a pass with gradients has no use for a key-value cache.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    adapters = [(module, _private.active_adapters(module)) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache:
            config.use_cache = False
        yield
    finally:
        if use_cache:
            config.use_cache = use_cache
        for module, active in adapters:
            _private.set_active_adapters(module, active)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@restoring
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode while the block runs; each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@restoring
def activated(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Activate an adapter while the block runs: alone, unless it is active already."""
    if adapter_name in model.active_adapters:
        yield
        return
    with preserved_state(model):
        model.set_adapter(adapter_name)
        yield


@restoring
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """Restore the generators of torch (on the CPU and the model's devices), numpy and Python afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    used = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    device_type = next(iter(used)).type if used else "cuda"
    try:
        with torch.random.fork_rng(devices=[device.index for device in used], device_type=device_type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
