"""The adapters below a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lorakit.adapters.atomic import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

_MARKS = {CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME}
Found = tuple[str, OSError | None]


def find_adapters(directory: str, *, recursive: bool) -> Iterator[Found]:
    """The directories that hold an adapter's config or weights, in the order of their names, with the error if any.

    These are the directory itself and its children; with `recursive`, all below it, also inside of adapters. Hidden
    directories (whose names begin with a dot) are left out. Links to directories are followed, and a directory that
    has several paths is visited once, by the first of them. A directory that cannot be listed comes with its error.
    """
    seen: set[tuple[int, int]] = set()
    todo = [(directory, 0)]
    while todo:
        path, depth = todo.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                names = {entry.name: _is_directory(entry) for entry in entries}
        except OSError as error:
            yield path, error
            continue
        if _MARKS & names.keys():
            yield path, None
        if recursive or depth == 0:
            children = sorted(name for name, is_directory in names.items() if is_directory and name[0] != ".")
            todo += [(os.path.join(path, name), depth + 1) for name in reversed(children)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
