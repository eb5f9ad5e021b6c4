"""Records of adapters on disk, by the SHA-256 of their files, so that an audit of a fleet continues where it stopped.

A record is found by the content of config and weights. Hashing reads the files, so the hash is kept too, with each
file's path, device, inode, size and time of change: a file in which all of these are the same is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit._files import write_file
from lorakit._version import __version__
from lorakit.adapters.atomic import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

_FORMAT = 1
_BLOCK = 1 << 20
Stamp = list[list[Any]]


@dataclass(frozen=True)
class Files:
    """The files of one adapter, by path, with what tells a changed file from an unchanged one."""

    paths: tuple[Path, ...]
    stamp: Stamp

    @classmethod
    def of(cls, source: Path) -> Files:
        """The config and the weights that opening `source`, a directory or a file, would read. Raises: OSError."""
        directory = source if source.is_dir() else source.parent
        weights = [source] if source != directory else [directory / WEIGHTS_NAME, directory / PICKLE_NAME]
        present = [path for path in weights if path.is_file()][:1]
        config = [directory / CONFIG_NAME] if (directory / CONFIG_NAME).is_file() else []
        paths = (*config, *present)
        return cls(paths, [_stamp(path) for path in paths])

    @property
    def size(self) -> int:
        return sum(entry[3] for entry in self.stamp)

    @property
    def key(self) -> str:
        """A hash of the files' paths."""
        return hashlib.sha256("\0".join(entry[0] for entry in self.stamp).encode(errors="surrogateescape")).hexdigest()

    def sha256(self) -> str:
        """The hash of all names, sizes and contents. Raises: OSError."""
        digest = hashlib.sha256()
        for path, entry in zip(self.paths, self.stamp, strict=True):
            kind = CONFIG_NAME if path.name == CONFIG_NAME else path.suffix
            digest.update(f"{kind} {entry[3]}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [os.path.abspath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class Cache:
    """Records in a directory, one JSON file for each content. Several processes may use it at the same time.

    A record that is damaged, or that another version of lorakit wrote, counts as absent.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def known_hash(self, files: Files) -> str | None:
        """The hash of unchanged files, without reading them."""
        found = self.read("files", files.key)
        return str(found["sha256"]) if found and found.get("stamp") == files.stamp else None

    def remember(self, files: Files, sha256: str) -> None:
        """Keep the hash of the files. Raises: OSError."""
        self.write("files", files.key, {"stamp": files.stamp, "sha256": sha256})

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """A record by its key, a hash in hexadecimal; None if there is none."""
        try:
            found = json.loads(self._path(kind, key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        current = isinstance(found, dict) and (found.get("format"), found.get("lorakit")) == (_FORMAT, __version__)
        return found.get("record") if current else None

    def write(self, kind: str, key: str, record: dict[str, Any]) -> None:
        """Keep a record. Raises: OSError."""
        text = json.dumps({"format": _FORMAT, "lorakit": __version__, "record": record}, allow_nan=False)
        write_file(self._path(kind, key), text.encode())

    def _path(self, kind: str, key: str) -> Path:
        return self.directory / kind / key[:2] / f"{key}.json"
