"""Writing of a safetensors file tensor by tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# The dtypes in the order in which safetensors puts them into a file, so that every tensor is aligned.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    getattr(torch, "float8_e8m0fnu", None): "F8_E8M0",  # since torch 2.7
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


class SafetensorsWriter:
    """A safetensors file whose tensors are written one at a time, in any order.

    The header comes first, so all shapes and dtypes must be known beforehand; the file has its full size at once. It is
    byte for byte the file that safetensors' `save_file` writes.

    Args:
        path: the file, which is replaced.
        layout: tensors by key, of which only shapes and dtypes are used (those of the device "meta" will do).
    Raises: OSError, at once where there is no space; TypeError for a dtype that a safetensors file cannot have.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp(), "two.safetensors")
        >>> with SafetensorsWriter(path, {"a": torch.empty(2, device="meta")}) as writer:
        ...     writer.write("a", torch.tensor([1.0, 2.0]))
        >>> load_file(path)
        {'a': tensor([1., 2.])}
    """

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        for key, tensor in layout.items():
            if tensor.dtype not in _DTYPES:
                raise TypeError(f"{key} is {tensor.dtype}, which a safetensors file cannot have.")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = 0
        self._missing: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        for key in sorted(layout, key=lambda key: (_ORDER[layout[key].dtype], key.encode())):
            tensor = layout[key]
            start, ends = ends, ends + tensor.nbytes
            self._missing[key] = start, tensor.shape, tensor.dtype
            entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, ends]}
            header[key] = entry
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb", buffering=0)
        try:
            _allocate(self._file.fileno(), self._start + ends)
            self._put(len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            self._file.close()
            raise

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one tensor to where it belongs; it is in the file when this returns.

        Raises: ValueError for a tensor that is not in the layout, has another shape or dtype there, or was written.
        """
        if key not in self._missing:
            raise ValueError(f"{key!r} is not in the layout of the file, or was written already.")
        start, shape, dtype = self._missing[key]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{key!r} must be {dtype} of shape {tuple(shape)}, as the header says; got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            self._put(data, self._start + start)
        del self._missing[key]

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        rest = memoryview(data)
        self._file.seek(offset)
        while rest:
            rest = rest[self._file.write(rest) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, such as {next(iter(self._missing))!r}.")


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the space, so that a full disk is an error now and not when half of the tensors are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
