"""Writing adapters: whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CONFIG_NAME = "adapter_config.json"


_EXCHANGE = 2  # Linux' RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD


@contextlib.contextmanager
def replaced_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside `out`, whose files take their places in `out` if the block ends well.

    A new `out` appears in one rename. An existing one is exchanged in one step for a directory that has the new files
    and, as hard links, its other ones: whatever happens, all of the old or all of the new files are there. Where the
    system cannot exchange directories (it is not Linux, or `out` is a mount point), each file is replaced in one step,
    and the adapter's config last.
    Raises: NotADirectoryError where `out` is a file; PermissionError where it may not be written to.
    """
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"`out` must be a directory, or not exist yet; {os.fspath(out)!r} is a file.")
    if target.exists() and not os.access(target, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "`out` may not be written to", os.fspath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        if not target.exists():
            staging.chmod(0o777 & ~_umask())
            try:
                staging.rename(target)
                return
            except OSError:
                if not target.is_dir():  # another process that writes the same has been first
                    raise
        written = {path.name for path in staging.iterdir()}
        if not _exchanged(staging, target, written):
            for name in sorted(written, key=lambda name: name == CONFIG_NAME):
                (staging / name).replace(target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchanged(staging: Path, target: Path, written: set[str]) -> bool:
    """Exchange `target` for `staging`, which gets `target`'s other files too; False, and no change, if that cannot be.

    What came into `target` in the meantime is moved after it.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    try:
        for path in target.iterdir():
            if path.name in written:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, staging / path.name, symlinks=True, copy_function=os.link)
            else:
                os.link(path, staging / path.name, follow_symlinks=False)
        shutil.copystat(target, staging)
        exchanged = renameat2(_HERE, os.fsencode(staging), _HERE, os.fsencode(target), _EXCHANGE) == 0
    except (OSError, shutil.Error):
        exchanged = False
    if exchanged:
        for path in staging.iterdir():
            if not os.path.lexists(target / path.name):
                path.replace(target / path.name)
    return exchanged


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: PeftConfig | Mapping[str, Any]) -> None:
    """Write `tensors` (named as PEFT names them in a checkpoint) and `config`, or what it holds, as PEFT's files.

    Raises: OSError where there is no space, or the files cannot be written for another reason.
    """
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in kept.items():
        if tensor.data_ptr() in seen:  # the format has no shared tensors
            kept[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    try:
        save_file(kept, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"The weights could not be written: {error}") from error
    if isinstance(config, Mapping):
        (directory / CONFIG_NAME).write_text(_plain_json(config), encoding="utf-8")
    else:
        config.save_pretrained(str(directory))


def _plain_json(config: Mapping[str, Any]) -> str:
    """As PEFT writes it: sorted keys, sets as lists."""

    def plain(value: object) -> object:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, Enum):
            return value.value
        raise TypeError(f"A config cannot hold a {type(value).__name__}: {value!r}.")

    return json.dumps(config, indent=2, sort_keys=True, default=plain)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
