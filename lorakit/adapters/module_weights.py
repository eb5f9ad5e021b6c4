"""The weights that an adapter was made for, by its modules: of a checkpoint, a model, or under the adapter itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorakit._checks import preview
from lorakit.adapters.adapter import AdapterModule, TensorInfo
from lorakit.adapters.base_weights import Checkpoint, open_base_weights, readable
from lorakit.errors import UnsupportedModelError

_LEAVES = ("weight", "in_proj_weight")  # the second is nn.MultiheadAttention's


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """Base weights, none of them read: `read` has those that the base has, by module."""

    path: str
    read: Mapping[str, Callable[[], Tensor]]
    dequantized: bool = False


def base_weights(
    base: str | os.PathLike[str] | nn.Module, modules: Sequence[AdapterModule], *, dequantize: bool = False
) -> BaseWeights:
    """The weights of an adapter's modules: of a directory or a file of safetensors, or of a model, adapted or not.

    Raises: AdapterFileError for what cannot be read; UnsupportedModelError for weights that are quantized, unless they
    are of a model and to be dequantized, and for a model with an adapter merged.
    """
    if isinstance(base, nn.Module):
        return _of_module(base, modules, dequantize)
    return _of_checkpoint(open_base_weights(base), modules)


def _of_checkpoint(checkpoint: Checkpoint, modules: Sequence[AdapterModule]) -> BaseWeights:
    read: dict[str, Callable[[], Tensor]] = {}
    quantized = []
    for module in modules:
        name = _unwrapped(module.name)
        keys = [key for leaf in _LEAVES if (key := f"{name}.{leaf}") in checkpoint.infos]
        if f"{name}.qweight" in checkpoint.infos or (keys and not readable(checkpoint.infos[keys[0]])):
            quantized.append(module.name)
        elif keys:
            read[module.name] = lambda key=keys[0]: checkpoint.read(key)  # type: ignore[misc]
    if quantized:
        raise UnsupportedModelError(
            f"{checkpoint.path!r} has {len(quantized)} adapted weights that are quantized: {preview(quantized)}. Pass "
            "the model that they were quantized from."
        )
    return BaseWeights(checkpoint.path, read)


def _of_module(model: nn.Module, modules: Sequence[AdapterModule], dequantize: bool) -> BaseWeights:
    from lorakit.adapters.in_model import read_weight

    get_base_model = getattr(model, "get_base_model", None)
    model = model if get_base_model is None else get_base_model()
    read: dict[str, Callable[[], Tensor]] = {}
    quantized = []
    for module in modules:
        layer: Any = _submodule(model, module.name) or _submodule(model, _unwrapped(module.name))
        if hasattr(layer, "get_base_layer"):
            if layer.merged:
                raise UnsupportedModelError(
                    f"{module.name} has an adapter merged into its weight; unmerge first (`unmerge_adapter()`)."
                )
            layer = layer.get_base_layer()
        leaves = [leaf for leaf in _LEAVES if isinstance(getattr(layer, leaf, None), Tensor)]
        if _is_quantized(layer, leaves):
            quantized.append(module.name)
            read[module.name] = lambda layer=layer: _dequantized(layer)  # type: ignore[misc]
        elif leaves:
            read[module.name] = lambda layer=layer, leaf=leaves[0]: read_weight(layer, leaf)  # type: ignore[misc]
    if quantized and not dequantize:
        raise UnsupportedModelError(
            f"{len(quantized)} adapted weights are quantized: {preview(quantized)}. Pass the model that they were "
            "quantized from as `base`, or `dequantize=True`, for the effective rank of the rounded weights."
        )
    return BaseWeights(type(model).__name__, read, bool(quantized))


def _unwrapped(name: str) -> str:
    """The name without the layers of PEFT's that stand in it: of the output projection of nn.MultiheadAttention."""
    return name.replace(".base_layer.", ".")


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_quantized(layer: object, leaves: Sequence[str]) -> bool:
    if hasattr(layer, "W_q") or hasattr(layer, "qweight"):  # HQQ; GPTQ, AWQ
        return True
    if not leaves:
        return False
    weight: Tensor = getattr(layer, leaves[0])
    plain_numbers = readable(TensorInfo(leaves[0], tuple(weight.shape), weight.dtype))
    return not plain_numbers or type(weight).__module__.startswith("torchao.")


def _dequantized(layer: Any) -> Tensor:
    """Raises: UnsupportedModelError where PEFT does not know the kind."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor | None = None
    if hasattr(layer, "W_q") or isinstance(getattr(layer, "weight", None), Tensor):
        # PEFT replaces an int8 weight of bitsandbytes on a CPU by one without its scales, which the layer then lacks
        kept, state = dict(layer._parameters), getattr(layer, "state", None)
        scales = getattr(state, "SCB", None)
        try:
            weight = dequantize_module_weight(layer).detach()
        finally:
            layer._parameters.update(kept)
            if state is not None:
                state.SCB = scales
    if weight is None or not readable(TensorInfo("weight", tuple(weight.shape), weight.dtype)):
        raise UnsupportedModelError(
            f"PEFT does not dequantize the weight of a {type(layer).__name__}. Pass the model that it was quantized "
            "from as `base`."
        )
    return weight
