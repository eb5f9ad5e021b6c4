"""Which files a writer may replace unasked: those whose mark is the hash of the tensors in them.

The mark is in the file's header. Another program that writes the file leaves it out, or its hash no longer fits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorakit.errors import OverwriteError

MARK = "lorakit.sha256"


def mark_of(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors on the CPU: names, dtypes, shapes and entries, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def has_marked_tensors(path: Path) -> bool:
    """Whether a safetensors file has the mark of its tensors; False for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            mark = (file.metadata() or {}).get(MARK)
        return mark is not None and mark == mark_of(load_file(path))
    except (OSError, SafetensorError):
        return False


def check_file(out: str | os.PathLike[str], is_marked: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Raise OverwriteError where `out` is a file that lorakit did not write, unless `overwrite`."""
    path = Path(out)
    if overwrite or not path.exists() or path.is_dir() or is_marked(path):
        return
    raise OverwriteError(
        f"`out` {os.fspath(out)!r} is a file that lorakit did not write. Pass `overwrite=True` (--overwrite) to "
        f"replace it, or name another file."
    )
