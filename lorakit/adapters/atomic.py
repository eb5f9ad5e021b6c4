"""Writing of adapter directories, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from lorakit._signals import restoring

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CONFIG_NAME = "adapter_config.json"

_RENAME_EXCHANGE = 2  # of Linux
_AT_FDCWD = -100


@restoring
def replaced_directory(out: str | os.PathLike[str], *, remove: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary directory, whose files replace those of `out` if the block ends without an error.

    A process that is killed at any point leaves all of the old files or all of the new ones in `out`. Files named in
    `remove` disappear from `out` in the same step, unless the block writes them. All other files stay, also those that
    appear in `out` meanwhile. A subdirectory that the block writes replaces the one of that name.

    An existing `out` stays the same directory (its inode), so a shell that stands in it finds the new files. For that
    it is exchanged twice: for a directory with the new files, and, when it has these files too, back again. A reader of
    the path sees one whole adapter at any time; a reader that stands in the directory may see files of both for an
    instant. If the process is killed between the two exchanges, or another one replaces the same directory at the same
    time, `out` may become another directory, and hidden directories beside it may remain.

    Where directories cannot be exchanged (systems other than Linux, mount points, file systems without hard links), the
    files are replaced one by one, each in one step and the config last: there, a kill in between can leave a mixture.
    Raises: NotADirectoryError if `out` is a file; PermissionError if it may not be written to.
    """
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"`out` must be a directory, or not exist yet; {os.fspath(out)!r} is a file.")
    if target.exists() and not os.access(target, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "`out` may not be written to", os.fspath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        if not target.exists():
            try:
                new.rename(target)
                return
            except OSError:
                if not target.is_dir():  # else another process has made it meanwhile
                    raise
        written = sorted((path.name for path in new.iterdir()), key=lambda name: name == CONFIG_NAME)
        removed = set(remove) - set(written)
        if not _replaced_at_once(target, work, written, removed):
            _replaced_one_by_one(target, new, written, removed)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replaced_at_once(target: Path, work: Path, written: Sequence[str], removed: Collection[str]) -> bool:
    """Give `target` the files `written` in `work/new`; False, with `target` unchanged, if the system cannot exchange.

    Every directory that is at `target` for some time is complete before it comes there, also if other processes do the
    same: what changes after an exchange lies in `work`, which is this process's own.
    """
    new, copies = work / "new", work / "copies"
    linked: set[int] = set()  # inodes of the other files
    changed = {*written, *removed}
    try:
        _link_tree(new, copies, set())
        for path in target.iterdir():
            if path.name not in changed:
                _link_tree(path, new / path.name, linked)
        shutil.copystat(target, new)
    except OSError:
        return False
    try:
        if not _exchange(new, target):
            return False
        # `new` is now the directory that was at `target`
        with contextlib.suppress(OSError):  # the exchange has been made: if it cannot come back, the other one stays
            _replaced_one_by_one(new, copies, written, removed)
            _exchange(new, target)
    finally:
        _move_unknown_files(new, target, changed, linked)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False if the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    code: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return code == 0


def _replaced_one_by_one(target: Path, source: Path, written: Iterable[str], removed: Iterable[str]) -> None:
    """Remove the files `removed` from `target`, then move the files `written` there from `source`, in this order."""
    for name in removed:
        _remove(target / name)
    for name in written:
        if _is_tree(target / name) or _is_tree(source / name):
            _remove(target / name)
        (source / name).replace(target / name)


def _link_tree(source: Path, destination: Path, linked: set[int]) -> None:
    """Make a hard link to a file, or to each file of a directory; adds their inodes to `linked`."""
    with contextlib.suppress(FileNotFoundError):  # `source` was removed meanwhile
        if not _is_tree(source):
            os.link(source, destination, follow_symlinks=False)
            linked.add(destination.lstat().st_ino)
            return
        destination.mkdir()
        for path in source.iterdir():
            _link_tree(path, destination / path.name, linked)
        shutil.copystat(source, destination)


def _move_unknown_files(source: Path, target: Path, changed: Collection[str], known: Collection[int]) -> None:
    """Move the files that are only in `source`, as they came after its files were linked, to `target`.

    These are the files with an inode that is not `known`. What is below a name in `changed` stays.
    """
    for path in list(source.rglob("*")):
        relative = path.relative_to(source)
        there = target / relative
        with contextlib.suppress(FileNotFoundError):  # `path` was removed meanwhile
            if _is_tree(path) or relative.parts[0] in changed or path.lstat().st_ino in known:
                continue
            if not os.path.lexists(there) or there.lstat().st_ino in known:
                there.parent.mkdir(parents=True, exist_ok=True)
                path.replace(there)


def _is_tree(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_tree(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the fields of a config as PEFT does: sorted keys, sets as lists. Raises: OSError."""

    def plain(value: object) -> object:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, Enum):
            return value.value
        raise TypeError(f"A config cannot hold a {type(value).__name__}: {value!r}.")

    text = json.dumps(config, indent=2, sort_keys=True, default=plain)
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
