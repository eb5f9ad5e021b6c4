"""Adapters on disk: a directory, a file, or a Hub id. Imports torch and safetensors, not PEFT or transformers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from io import FileIO, IOBase
from pathlib import Path

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
    """The adapter in a directory or a ``.safetensors`` or ``.bin`` file, or that of a Hub id (``owner/name``).

    The config of a file is the one beside it, if there is one. Pickles (``.bin``) are loaded at once, with
    `torch.load(weights_only=True)`, which runs none of their code; of safetensors only the header is read yet.
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
    return _open_directory(name, download_adapter(name))


def download_adapter(repo_id: str) -> Path:
    """The directory with the config and weights of a Hub id, downloaded once. Raises: AdapterFileError."""
    if not _HUB_ID.fullmatch(repo_id):
        raise AdapterFileError(f"{repo_id!r} is neither a directory nor a file, and not a Hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME]))
    except Exception as error:  # many types: no network, offline mode, no such repository, no access
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterFileError(
            f"{repo_id!r} is not a directory or file here, and could not be downloaded from the Hub: {reason}"
        ) from error


def _open_directory(name: str, directory: Path) -> Adapter:
    config = directory / CONFIG_NAME
    if not config.exists():
        nested = sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG_NAME}"))
        raise AdapterFileError(
            f"{name!r} has no {CONFIG_NAME}, so it is not an adapter that PEFT saved. "
            + (f"Do you mean {nested[0]!r}? " if nested else "")
            + "To open tensors without their config, pass the .safetensors file itself."
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
        raise AdapterFileError(f"{str(path)!r} is too large for a config ({path.stat().st_size:,} bytes).")
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
    except Exception as error:  # torch's unpickler raises nearly every type
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterFileError(
            f"{str(path)!r} cannot be loaded as plain tensors (weights_only=True), the only safe way: {reason}"
        ) from None
    plain = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        for key, value in content.items()
    )
    if not plain:
        raise AdapterFileError(f"{str(path)!r} must hold a dict of tensors by name.")
    return {key: value.detach() for key, value in content.items()}


class SafetensorsFile:
    """The tensors of a safetensors file.

    The header is read once; each tensor is read into memory of its own. The file is open only during a read, and must
    still be the one that the header was read from.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as checked:  # refuses headers that do not fit the file
                dtypes = {key: checked.get_slice(key).get_dtype() for key in checked.keys()}  # noqa: SIM118
            with path.open("rb") as file:
                self._version = _version(file)
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
                self._offsets = {key: start + header[key]["data_offsets"][0] for key in dtypes}
                self._infos = {
                    key: TensorInfo(key, tuple(header[key]["shape"]), _DTYPES.get(dtype))
                    for key, dtype in dtypes.items()
                }
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise AdapterFileError(f"{str(self._path)!r} is not a whole safetensors file: {error}") from error

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        with self._open() as file:
            yield lambda key: self._tensor(file, key)

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        shape = self._infos[key].shape
        with self._open() as file:
            if not shape:
                yield self._tensor(file, key)
                return
            for first in range(0, shape[0], step):
                yield self._tensor(file, key, slice(first, min(first + step, shape[0])))

    @contextlib.contextmanager
    def _open(self) -> Iterator[FileIO]:
        with self._readable():
            file = self._path.open("rb", buffering=0)  # what was written meanwhile is seen
        with file:
            with self._readable():
                version = _version(file)
            if version != self._version:
                raise AdapterFileError(f"{str(self._path)!r} was changed after it had been opened. Open it again.")
            yield file

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AdapterFileError(f"{str(self._path)!r} cannot be read: {error}.") from error

    def _tensor(self, file: FileIO, key: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows."""
        with self._readable():
            return self._read(file, key, rows)

    def _read(self, file: FileIO, key: str, rows: slice) -> Tensor:
        info = self._infos[key]
        if info.dtype is None:
            with safe_open(self._path, framework="pt") as checked:
                tensor: Tensor = checked.get_tensor(key)
                return tensor[rows] if info.shape else tensor
        offset, shape = self._offsets[key], info.shape
        if rows != slice(None):
            offset += rows.start * math.prod(shape[1:]) * info.dtype.itemsize
            shape = (rows.stop - rows.start, *shape[1:])
        data = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        file.seek(offset)
        rest = data.numpy().data
        while rest:
            count = file.readinto(rest)
            if not count:
                raise AdapterFileError(f"{str(self._path)!r} ends within {key!r}.")
            rest = rest[count:]
        return data.view(info.dtype).reshape(shape)


def _version(file: IOBase) -> tuple[int, int, int]:
    """What tells a file from one that replaced it."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


class TensorDict:
    """The tensors of an adapter in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def infos(self) -> Mapping[str, TensorInfo]:
        return {key: TensorInfo(key, tuple(value.shape), value.dtype) for key, value in self._tensors.items()}

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        yield self._tensors.__getitem__

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        yield from row_slices(self._tensors[key], step)
