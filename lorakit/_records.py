"""The records of a plan: one JSON file a trial, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit._files import write_file
from lorakit.errors import PlanError

_NOTHING = object()


class Records:
    """The record files of a plan's trials, in one directory.

    `settings` are those of each trial, by its key. Raises: PlanError for settings that are not JSON data, and for a
    directory that cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.directory = Path(directory)
        self._settings: dict[str, dict[str, Any]] = {}
        for key, given in settings.items():
            try:
                self._settings[key] = json.loads(json.dumps(dict(given), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise PlanError(f"`settings` of trial {key!r} must be JSON data: {error}.") from error
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise PlanError(
                f"The records of a plan need a directory; {os.fspath(directory)!r} is a file, or below one."
            ) from error

    def path(self, key: str) -> Path:
        """A readable name, and a part of the key's hash, since different keys may have the same readable name."""
        name = re.sub(r"[^\w.=+-]+", "-", key, flags=re.ASCII).strip("-.")[:80]
        return self.directory / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """The result of a trial; None if it has no record. Raises: PlanError."""
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            record = json.loads(text)
            settings, result = dict(record["settings"]), dict(record["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"{os.fspath(path)!r} is not the record of a trial. Remove it, and the trial runs again."
            ) from error
        differing = list(_differences(settings, self._settings[key]))
        if differing:
            raise PlanError(
                f"The record of {key!r} in {os.fspath(self.directory)!r} has other settings: {'; '.join(differing)}. "
                f"Use another directory, or the same settings."
            )
        return result

    def write(self, key: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the result of a trial, and return it as JSON gives it back.

        A record that another process wrote meanwhile stays. Raises: TypeError or ValueError for a result that is not
        JSON data.
        """
        if not isinstance(result, Mapping):
            raise TypeError(f"The result of a trial must be a dictionary of JSON data; got {type(result).__name__}.")
        try:
            text = json.dumps(
                {"key": key, "settings": self._settings[key], "result": dict(result)}, indent=1, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"The result of a trial must be JSON data with finite numbers: {error}.") from error
        kept = self.read(key)
        if kept is not None:
            return kept
        write_file(self.path(key), text)
        written: dict[str, Any] = json.loads(text)["result"]
        return written


def check_keys(keys: list[str]) -> None:
    """Raises: PlanError for keys that are not non-empty strings, or not unique."""
    wrong = [key for key in keys if not isinstance(key, str) or not key]
    if wrong:
        raise PlanError(f"`key` of each trial must be a non-empty string; got {wrong[0]!r}.")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise PlanError(f"`key` must be unique in a plan; {twice[0]!r} is not.")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key in {**now, **before}:
        one, other = before.get(key, _NOTHING), now.get(key, _NOTHING)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key} {_shown(one)}, now {_shown(other)}"


def _shown(value: Any) -> str:
    return "absent" if value is _NOTHING else repr(value)
