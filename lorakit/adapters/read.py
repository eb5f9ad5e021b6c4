"""Adapters at rest: a directory, a file, or a Hub id. Imports torch and safetensors, not PEFT or transformers."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Read, TensorInfo, row_slices
from lorakit.adapters.atomic import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.parse import assemble
from lorakit.errors import AdapterFileError, LorakitError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_CONFIG = 1 << 26  # bytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_file_or_hub(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a directory, in a ``.safetensors`` or ``.bin`` file, or of a Hub id (``owner/name``).

    A file's config is looked for beside it, and may be absent. Pickles (``.bin``) are read with
    `torch.load(weights_only=True)`, which runs no code of theirs, and whole; safetensors are not read yet.
    Raises: AdapterFileError, UnsupportedModelError.
    """
    name = os.fspath(path)
    try:
        found = Path(path)
        if found.is_dir():
            return _open_directory(name, found)
        if found.exists() or found.is_symlink():
            return _open_weights(name, found, _read_config(found.parent / CONFIG_NAME, required=False))
    except (OSError, ValueError) as error:
        if isinstance(error, LorakitError):
            raise
        raise AdapterFileError(f"{name!r} cannot be read: {error}.") from error
    if not _HUB_ID.fullmatch(name):
        raise AdapterFileError(f"{name!r} is neither a directory nor a file, nor can it be a Hub id (owner/name).")
    return _open_directory(name, _download(name))


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME]))
    except Exception as error:  # of many kinds: no network, offline mode, no such repository, no access
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterFileError(
            f"{repo_id!r} is no directory or file here, and it could not be had from the Hub: {reason}"
        ) from error


def _open_directory(name: str, directory: Path) -> Adapter:
    config = directory / CONFIG_NAME
    if not config.exists():
        nested = sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG_NAME}"))
        raise AdapterFileError(
            f"{name!r} has no {CONFIG_NAME}, so it is no adapter that PEFT saved. "
            + (f"Is {nested[0]!r} meant? " if nested else "")
            + "To look at tensors without their config, name the .safetensors file itself."
        )
    settings = _read_config(config, required=True)
    for weights in (directory / WEIGHTS_NAME, directory / PICKLE_NAME):
        if weights.exists() or weights.is_symlink():
            return _open_weights(name, weights, settings)
    raise AdapterFileError(f"{name!r} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}.")


def _read_config(path: Path, *, required: bool) -> AdapterSettings:
    if not required and not path.exists():
        return AdapterSettings()
    _check_regular(path)
    if path.stat().st_size > _MAX_CONFIG:
        raise AdapterFileError(f"{str(path)!r} is larger than a config can be ({path.stat().st_size:,} bytes).")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(path)!r} is not JSON: {error}.") from None
    try:
        return AdapterSettings.from_config(config)
    except LorakitError as error:
        raise type(error)(f"{str(path)!r}: {error}") from None


def _open_weights(name: str, path: Path, settings: AdapterSettings) -> Adapter:
    _check_regular(path)
    if path.suffix == ".safetensors":
        return assemble(name, settings, SafetensorsFile(path))
    if path.suffix in (".bin", ".pt", ".pth"):
        return assemble(name, settings, TensorDict(_load_pickle(path)))
    raise AdapterFileError(f"{str(path)!r} must end in .safetensors or .bin.")


def _check_regular(path: Path) -> None:
    if not path.is_file():
        what = "is a link to nothing" if path.is_symlink() and not path.exists() else "is not a regular file"
        raise AdapterFileError(f"{str(path)!r} {what}.")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises nearly everything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterFileError(
            f"{str(path)!r} cannot be loaded as plain tensors (weights_only), and nothing else is trusted: {reason}"
        ) from None
    plain = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        for key, value in content.items()
    )
    if not plain:
        raise AdapterFileError(f"{str(path)!r} must hold a dict of tensors by name.")
    return {key: value.detach() for key, value in content.items()}


class SafetensorsFile:
    """A safetensors file, mapped into memory only while it is read, so that what was read does not add up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            self._infos = {
                key: TensorInfo(key, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
                for key, part in slices.items()
            }

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{str(self._path)!r} is not a whole safetensors file: {error}") from error

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        with self._open() as file:
            yield file.get_tensor

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        info = self._infos[key]
        if not info.shape:
            with self.reader() as read:
                yield read(key)
            return
        for start in range(0, info.shape[0], step):
            with self._open() as file:
                yield file.get_slice(key)[start : start + step]


class TensorDict:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def infos(self) -> Mapping[str, TensorInfo]:
        return {key: TensorInfo(key, tuple(value.shape), value.dtype) for key, value in self._tensors.items()}

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        yield self._tensors.__getitem__

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        yield from row_slices(self._tensors[key], step)
