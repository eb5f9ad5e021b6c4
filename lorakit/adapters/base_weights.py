"""The weights of base models, on disk (safetensors, also in shards) or in memory; one tensor is read at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._checks import preview
from lorakit.adapters._private import restored_parameters
from lorakit.adapters.adapter import AdapterModule, TensorInfo
from lorakit.adapters.read import SafetensorsFile
from lorakit.errors import AdapterFileError, UnsupportedModelError

_INDEX = "model.safetensors.index.json"
_MAX_INDEX = 1 << 28  # bytes
_WEIGHT_NAMES = ("weight", "in_proj_weight")  # the second is that of nn.MultiheadAttention


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """All tensors of a model by name. `read` returns one of them; do not write to it."""

    path: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """The base weights of an adapter's modules. `read` has a function for each module that the base has too.

    `dequantized` says whether any of them is quantized, and so read as rounded values.
    """

    path: str
    read: Mapping[str, Callable[[], Tensor]]
    dequantized: bool = False


def open_base_weights(model: str | os.PathLike[str] | nn.Module) -> BaseWeights:
    """The weights of a model: a directory with model.safetensors or its shards, a .safetensors file, or a module.

    Of tied weights in a module only the first is there.
    Raises: AdapterFileError for files that cannot be read; UnsupportedModelError for a model with adapters attached;
        TypeError for other arguments.
    """
    if isinstance(model, nn.Module):
        return _base_weights_in_memory(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"A model must be a path or an nn.Module; got {type(model).__name__}.")
    name, path = os.fspath(model), Path(model)
    try:
        files = [SafetensorsFile(file) for file in _weight_files(name, path)]
    except OSError as error:
        raise AdapterFileError(f"{name!r} cannot be read: {error}.") from error
    file_of: dict[str, SafetensorsFile] = {}
    for file in files:
        for key in file.infos():
            if key in file_of:
                raise AdapterFileError(
                    f"{name!r} has {key!r} in two of its files. Remove the file that does not belong."
                )
            file_of[key] = file

    def read(key: str) -> Tensor:
        with file_of[key].reader() as from_file:
            return from_file(key)

    return BaseWeights(name, {key: file.infos()[key] for key, file in file_of.items()}, read)


def open_module_weights(
    base: str | os.PathLike[str] | nn.Module, modules: Sequence[AdapterModule], *, dequantize: bool = False
) -> ModuleWeights:
    """The base weights of an adapter's modules: from what `open_base_weights` takes, or from a model with adapters.

    With `dequantize`, the quantized weights of a model in memory are read as the values that they were rounded to.
    Raises: AdapterFileError for files that cannot be read; UnsupportedModelError for a model with an adapter merged
        into it, and for quantized weights without `dequantize` or on disk.
    """
    if isinstance(base, nn.Module):
        return _module_weights_in_memory(base, modules, dequantize)
    weights = open_base_weights(base)
    read: dict[str, Callable[[], Tensor]] = {}
    quantized = []
    for module in modules:
        name = _without_base_layers(module.name)
        keys = [key for leaf in _WEIGHT_NAMES if (key := f"{name}.{leaf}") in weights.infos]
        if f"{name}.qweight" in weights.infos or (keys and not readable(weights.infos[keys[0]])):
            quantized.append(module.name)
        elif keys:
            read[module.name] = lambda key=keys[0]: weights.read(key)  # type: ignore[misc]
    if quantized:
        raise UnsupportedModelError(
            f"{weights.path!r} has {len(quantized)} quantized weights that the adapter adapts: {preview(quantized)}. "
            "Pass the model that they were quantized from."
        )
    return ModuleWeights(weights.path, read)


def readable(info: TensorInfo) -> bool:
    """Whether a tensor is of a dtype to compute with: float16, bfloat16, float32 or float64."""
    return info.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _weight_files(name: str, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterFileError(f"{name!r} must be a .safetensors file, or a directory with such files.")
        return [path]
    if not path.is_dir():
        raise AdapterFileError(f"{name!r} is neither a directory nor a regular file.")
    if (path / _INDEX).is_file():
        return [path / file for file in _shards(path / _INDEX)]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise AdapterFileError(f"{name!r} has no .safetensors files. Save the model with `safe_serialization=True`.")
    return [file for file in found if file.name == "model.safetensors"] or found


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists, all of them beside it."""
    if index.stat().st_size > _MAX_INDEX:
        raise AdapterFileError(f"{str(index)!r} is too large for an index ({index.stat().st_size:,} bytes).")
    try:
        content: Any = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(index)!r} is not JSON: {error}.") from None
    shards = content.get("weight_map") if isinstance(content, dict) else None
    named = list(shards.values()) if isinstance(shards, dict) else []
    names = list(dict.fromkeys(named)) if all(map(_is_shard_name, named)) else []
    if not names:
        raise AdapterFileError(f"{str(index)!r} must have a `weight_map` from tensors to the names of files beside it.")
    for file in names:
        if not (index.parent / file).is_file():
            raise AdapterFileError(f"{str(index)!r} lists {file!r}, which does not exist.")
    return names


def _is_shard_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value


def _base_weights_in_memory(model: nn.Module) -> BaseWeights:
    from lorakit.adapters.in_model import read_weight

    parameters = dict(model.named_parameters())
    if any(".base_layer." in name for name in parameters):
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters attached. Merge them (`merge_and_unload()`), or pass the base model "
            "and the adapter."
        )

    def read(key: str) -> Tensor:
        owner, _, leaf = key.rpartition(".")
        return read_weight(model.get_submodule(owner), leaf)

    infos = {name: TensorInfo(name, tuple(value.shape), value.dtype) for name, value in parameters.items()}
    return BaseWeights(type(model).__name__, infos, read)


def _module_weights_in_memory(model: nn.Module, modules: Sequence[AdapterModule], dequantize: bool) -> ModuleWeights:
    from lorakit.adapters.in_model import read_weight

    get_base_model = getattr(model, "get_base_model", None)
    model = model if get_base_model is None else get_base_model()
    read: dict[str, Callable[[], Tensor]] = {}
    quantized = []
    for module in modules:
        layer: Any = _submodule(model, module.name) or _submodule(model, _without_base_layers(module.name))
        if hasattr(layer, "get_base_layer"):
            if layer.merged:
                raise UnsupportedModelError(
                    f"{module.name} has an adapter merged into its weight; unmerge first (`unmerge_adapter()`)."
                )
            layer = layer.get_base_layer()
        leaves = [leaf for leaf in _WEIGHT_NAMES if isinstance(getattr(layer, leaf, None), Tensor)]
        if _is_quantized(layer, leaves):
            quantized.append(module.name)
            read[module.name] = lambda layer=layer: _dequantized(layer)  # type: ignore[misc]
        elif leaves:
            read[module.name] = lambda layer=layer, leaf=leaves[0]: read_weight(layer, leaf)  # type: ignore[misc]
    if quantized and not dequantize:
        raise UnsupportedModelError(
            f"{len(quantized)} adapted weights are quantized: {preview(quantized)}. Pass the model that they were "
            "quantized from as `base`, or `dequantize=True` to use the rounded weights."
        )
    return ModuleWeights(type(model).__name__, read, bool(quantized))


def _without_base_layers(name: str) -> str:
    """A module's name before PEFT wrapped it; in nn.MultiheadAttention it wraps both a module and its submodule."""
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
    info = TensorInfo(leaves[0], tuple(weight.shape), weight.dtype)
    return not readable(info) or type(weight).__module__.startswith("torchao.")


def _dequantized(layer: Any) -> Tensor:
    """Raises: UnsupportedModelError if PEFT cannot dequantize this kind of layer."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor | None = None
    if hasattr(layer, "W_q") or isinstance(getattr(layer, "weight", None), Tensor):
        # On a CPU, PEFT replaces an int8 weight of bitsandbytes by one without its scales.
        state = getattr(layer, "state", None)
        scales = getattr(state, "SCB", None)
        try:
            with restored_parameters(layer):
                weight = dequantize_module_weight(layer).detach()
        finally:
            if state is not None:
                state.SCB = scales
    if weight is None or not readable(TensorInfo("weight", tuple(weight.shape), weight.dtype)):
        raise UnsupportedModelError(
            f"PEFT cannot dequantize the weight of a {type(layer).__name__}. Pass the model that it was quantized from "
            "as `base`."
        )
    return weight
