"""Which key of a pattern (`rank_pattern` and the like) a module name matches, for thousands of both."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator

# A key without special characters but the dot: letters, digits, escaped characters.
_LITERAL = re.compile(r"(?P<anchor>\^?)(?P<body>(?:[\w.-]|\\[.+*?()|$^{}\[\]\\ -])+)", re.ASCII)
_CHARACTER = re.compile(r"\\?.")


@functools.lru_cache(maxsize=4096)
def compiled(key: str) -> re.Pattern[str]:
    """A key as the expression by which PEFT's `get_pattern_key` compares it with a module's name, from its start."""
    return re.compile(rf"(.*\.)?({key})$")


class PatternMatcher:
    """The keys of a pattern, as PEFT's `get_pattern_key` matches them to module names: the first that matches.

    Keys that are plain names, with dots as they are or escaped, are found in tables, so that ten thousand of them for
    ten thousand modules take no longer than is linear. All others are tried one after the other.
    Raises: re.error for a key that is no regular expression.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = list(keys)
        self._tables: dict[int, list[_Table]] = {}  # by the length of the names
        self._others: list[tuple[int, re.Pattern[str]]] = []
        tables: dict[tuple[int, tuple[int, ...]], _Table] = {}
        for index, key in enumerate(self._keys):
            literal = _LITERAL.fullmatch(key)
            characters = _CHARACTER.findall(literal["body"]) if literal else []
            fixed = tuple(i for i, character in enumerate(characters) if character != ".")
            if literal is None or not fixed:
                self._others.append((index, compiled(key)))
                continue
            shape = len(characters), fixed
            if shape not in tables:
                tables[shape] = _Table(fixed)
                self._tables.setdefault(len(characters), []).append(tables[shape])
            text = "".join(character[-1] for character in characters)
            tables[shape].add(text, index, anchored=bool(literal["anchor"]))

    def first(self, name: str) -> str | None:
        """The first key that matches; None if none does."""
        best = min(self._literals(name), default=len(self._keys))
        for index, expression in self._others:
            if index > best:
                break
            if expression.match(name):
                best = index
        return self._keys[best] if best < len(self._keys) else None

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The keys that match none of the names."""
        matched = {index for name in names for index in self._literals(name)}
        matched |= {index for index, expression in self._others if any(map(expression.match, names))}
        known = set(names)
        return [key for index, key in enumerate(self._keys) if index not in matched and key not in known]

    def _literals(self, name: str) -> Iterator[int]:
        """The indices of the literal keys that match, in no order."""
        if "\n" in name:  # neither a dot nor the end of an expression is then what it seems
            yield from (i for i, key in enumerate(self._keys) if compiled(key).match(name))
            return
        start = 0
        while True:
            part = name[start:]
            for table in self._tables.get(len(part), ()):
                yield from table.find(part, whole=start == 0)
            start = name.find(".", start) + 1
            if start == 0:
                return


class _Table:
    """Literal keys of one length with dots, which stand for any character, in the same places."""

    def __init__(self, fixed: tuple[int, ...]) -> None:
        self._fixed = fixed
        self._anchored: dict[str, list[int]] = {}
        self._anywhere: dict[str, list[int]] = {}

    def add(self, text: str, index: int, *, anchored: bool) -> None:
        (self._anchored if anchored else self._anywhere).setdefault(self._select(text), []).append(index)

    def find(self, text: str, *, whole: bool) -> list[int]:
        selected = self._select(text)
        found = self._anywhere.get(selected, [])
        return found + self._anchored.get(selected, []) if whole else found

    def _select(self, text: str) -> str:
        return text if len(self._fixed) == len(text) else "".join([text[i] for i in self._fixed])
