"""Writing one file: whole or not at all, through links, and into devices and pipes."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from lorakit._signals import restoring

T = TypeVar("T")

_MAX_LINKS = 40  # as Linux has it
_MAX_SUFFIX = 32


def write_file(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write bytes, or text as UTF-8; see `make_file`. Returns the path as it was given."""
    data = content if isinstance(content, bytes) else content.encode(errors="replace")
    make_file(path, lambda staging: staging.write_bytes(data))
    return Path(path)


def make_file(path: str | os.PathLike[str], make: Callable[[Path], T]) -> T:
    """Have `make` write a new file at the path that it is given, then put that in the place of `path`, in one step.

    A link stays, and the file that it leads to is replaced. What is not a regular file (a pipe, a device, /dev/stdout)
    gets the content. Missing directories are made. An error or an interrupt leaves `path` as it was, and no other file.
    Raises: OSError; whatever `make` raises.
    """
    given = os.fspath(path)
    descriptor = _descriptor(given)
    mode = None if descriptor is not None else _mode(given)
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(f"A file's path is needed; {given!r} is a directory. Add a file's name.")
    if descriptor is not None or (mode is not None and not stat.S_ISREG(mode)):
        with _staging(Path(tempfile.gettempdir()), Path(given).suffix) as staging:
            made = make(staging)
            with _stream(given, descriptor) as stream, staging.open("rb") as content:
                shutil.copyfileobj(content, stream)
        return made
    target = Path(os.path.realpath(given))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staging(target.parent, target.suffix) as staging:
        made = make(staging)
        if mode is not None:
            staging.chmod(stat.S_IMODE(mode))
        staging.replace(target)
    return made


@restoring
def _staging(directory: Path, suffix: str) -> Iterator[Path]:
    """A path that does not exist, in `directory`; what is written there and not moved away is removed."""
    staging = directory / f".{secrets.token_hex(8)}{suffix if len(suffix) <= _MAX_SUFFIX else ''}"
    try:
        yield staging
    finally:
        staging.unlink(missing_ok=True)


def _mode(path: str) -> int | None:
    """The mode of what a path leads to; None for nothing."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _stream(path: str, descriptor: int | None) -> Iterator[BinaryIO]:
    if descriptor is not None:  # opened by its path, a file would be written from its beginning
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    try:
        with open(path if descriptor is None else os.dup(descriptor), "wb") as opened:
            yield opened
    except BrokenPipeError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _descriptor(path: str) -> int | None:
    """The number of the open file that a path such as /dev/stdout or /dev/fd/3 stands for; None for other paths."""
    for _ in range(_MAX_LINKS):
        directory, name = os.path.split(os.path.abspath(path))
        if name.isdecimal() and os.path.realpath(directory) in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(name)
        if not os.path.islink(path):
            return None
        path = os.path.join(directory, os.readlink(path))
    return None
