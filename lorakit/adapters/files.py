"""Writing adapters: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


@contextlib.contextmanager
def replaced_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside `out`, whose files take their places in `out` if the block ends well.

    A new `out` appears in one rename. In an existing one each file is replaced in one step, and the adapter's config
    last; other files stay.
    Raises: NotADirectoryError where `out` is a file.
    """
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"`out` must be a directory, or not exist yet; {str(target)!r} is a file.")
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
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: PeftConfig) -> None:
    """Write `tensors` (named as PEFT names them in a checkpoint) and `config` as PEFT's files."""
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in kept.items():
        if tensor.data_ptr() in seen:  # the format has no shared tensors
            kept[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    save_file(kept, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
