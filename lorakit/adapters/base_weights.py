"""The weights of whole models, on disk (safetensors, also in shards) or in memory, one tensor read at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import TensorInfo
from lorakit.adapters.read import SafetensorsFile
from lorakit.errors import AdapterFileError, UnsupportedModelError

_INDEX = "model.safetensors.index.json"
_MAX_INDEX = 1 << 28  # bytes


class _Reader(Protocol):
    def __call__(self, key: str) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tensors by name; `read` gives one, not to be written to."""

    path: str
    infos: Mapping[str, TensorInfo]
    read: _Reader


def open_base_weights(model: str | os.PathLike[str] | nn.Module) -> Checkpoint:
    """The weights of a model: a directory with model.safetensors or its shards, a .safetensors file, or a module.

    Tied weights of a module are there once. Raises: AdapterFileError for what cannot be read; UnsupportedModelError
    for a model that adapters are attached to; TypeError for other arguments.
    """
    if isinstance(model, nn.Module):
        return _of_module(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"A model must be a path or an nn.Module; got {type(model).__name__}.")
    name, path = os.fspath(model), Path(model)
    try:
        files = [SafetensorsFile(file) for file in _files(name, path)]
    except OSError as error:
        raise AdapterFileError(f"{name!r} cannot be read: {error}.") from error
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for key in file.infos():
            if key in where:
                raise AdapterFileError(f"{name!r} has {key!r} in two of its files; which of them is meant?")
            where[key] = file

    def read(key: str) -> Tensor:
        with where[key].reader() as from_file:
            return from_file(key)

    return Checkpoint(name, {key: file.infos()[key] for key, file in where.items()}, read)


def _files(name: str, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterFileError(f"{name!r} must be a .safetensors file, or a directory with such files.")
        return [path]
    if not path.is_dir():
        raise AdapterFileError(f"{name!r} is neither a directory nor a regular file.")
    if (path / _INDEX).is_file():
        return [path / file for file in _shards(path / _INDEX)]
    found = sorted(path.glob("*.safetensors"))
    whole = [file for file in found if file.name == "model.safetensors"]
    if not found:
        raise AdapterFileError(f"{name!r} has no .safetensors files. Save the model with `safe_serialization`.")
    return whole or found


def _shards(index: Path) -> list[str]:
    """File names in an index, each beside it."""
    if index.stat().st_size > _MAX_INDEX:
        raise AdapterFileError(f"{str(index)!r} is larger than an index can be ({index.stat().st_size:,} bytes).")
    try:
        content: Any = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(index)!r} is not JSON: {error}.") from None
    shards = content.get("weight_map") if isinstance(content, dict) else None
    named = list(shards.values()) if isinstance(shards, dict) else []
    names = list(dict.fromkeys(named)) if all(map(_is_name, named)) else []
    if not names:
        raise AdapterFileError(f"{str(index)!r} must have a `weight_map` of tensors to names of files beside it.")
    for file in names:
        if not (index.parent / file).is_file():
            raise AdapterFileError(f"{str(index)!r} names {file!r}, which is not there.")
    return names


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value


def _of_module(model: nn.Module) -> Checkpoint:
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
    return Checkpoint(type(model).__name__, infos, read)


def readable(info: TensorInfo) -> bool:
    """Whether a tensor holds numbers that can be computed with: float16, bfloat16, float32 or float64."""
    return info.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
