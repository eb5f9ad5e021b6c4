"""Which key of a pattern (`rank_pattern` and the like) a module name matches, for thousands of both.

Keys come from strangers' configs, and some regular expressions take longer than anyone waits. They are matched by the
package `regex`, which can stop, with the meaning that they have in `re`, which PEFT uses.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Collection, Iterable, Iterator

import regex

from lorakit.errors import PatternError
from lorakit.naming import _private

# A key without special characters but the dot: letters, digits, escaped characters.
_LITERAL = re.compile(r"(?P<anchor>\^?)(?P<body>(?:[\w.-]|\\[.+*?()|$^{}\[\]\\ -])+)", re.ASCII)
_CHARACTER = re.compile(r"\\?.")
_TOKEN = re.compile(r"\\N\{[^}]*\}|\\.|\[\^?\]?|\{(?:\d+(?:,\d*)?|,\d*)\}|.", re.DOTALL)

_MAX_LENGTH = 20_000  # characters
_MAX_SIZE = 100_000  # of an expression, with what it repeats written out
_SECONDS = 5.0  # for all matches of a matcher together, without the first millisecond of each
_FREE = 1e-3


@functools.lru_cache(maxsize=4096)
def compiled(key: str) -> Expression:
    """A key as the expression by which PEFT's `get_pattern_key` compares it with a module's name, from its start.

    Raises: re.error for a key that is no regular expression; PatternError for one that is too large.
    """
    return Expression(key)


class Expression:
    """A regular expression that stops when it takes too long. It matches what it matches in `re`."""

    def __init__(self, key: str) -> None:
        self.key = key
        pattern = rf"(.*\.)?({key})$"
        with warnings.catch_warnings():  # of what may mean something else in a later Python
            warnings.simplefilter("ignore")
            if len(key) > _MAX_LENGTH or _private.expanded_size(pattern) > _MAX_SIZE:
                raise PatternError(
                    f"The regular expression {shown(key)} is too large. Write several, or a shorter one."
                )
            re.compile(pattern)  # `regex` knows more than `re`, which decides what is an error
            self._pattern = regex.compile(rf"(.*\.)?({_as_in_re(key)})$", regex.VERSION0)

    def match(self, name: str, budget: Budget) -> bool:
        """Whether it matches the name. Raises: PatternError where the time is used up."""
        started = time.perf_counter()
        try:
            if budget.left <= 0:
                raise TimeoutError
            found = self._pattern.match(name, timeout=budget.left) is not None
        except TimeoutError:
            budget.left = 0.0
            raise PatternError(
                f"The regular expression {shown(self.key)} takes too long for the module name {shown(name)}. Write "
                f"it without repetitions inside repetitions."
            ) from None
        budget.left -= max(0.0, time.perf_counter() - started - _FREE)
        return found


class Budget:
    """The seconds that are left for matching."""

    def __init__(self) -> None:
        self.left = _SECONDS


def _as_in_re(key: str) -> str:
    """A key without what `regex` alone reads as syntax: fuzzy matches in braces, and classes such as [[:alpha:]]."""
    parts, in_set = [], False
    for token in _TOKEN.findall(key):
        if in_set:
            parts.append("\\[" * token.count("[") + token.lstrip("[") if token[0] == "[" else token)
            in_set = not token.endswith("]") or token[0] == "\\"
        else:
            parts.append("\\{" if token == "{" else token)
            in_set = token[0] == "["
    return "".join(parts)


def shown(text: str) -> str:
    """An expression or a name for a message, cut where it is long."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


def is_literal(key: str) -> bool:
    """Whether a key is a plain name, in which a dot may stand for any character; it is matched in no time."""
    return _LITERAL.fullmatch(key) is not None


class PatternMatcher:
    """The keys of a pattern, as PEFT's `get_pattern_key` matches them to module names: the first that matches.

    Keys that are plain names, with dots as they are or escaped, are found in tables, so that ten thousand of them for
    ten thousand modules take no longer than is linear. All others are tried one after the other.
    Raises: re.error for a key that is no regular expression; PatternError for one that is too large or takes too long.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = list(keys)
        self._budget = Budget()
        self._tables: dict[int, list[_Table]] = {}  # by the length of the names
        self._others: list[tuple[int, Expression]] = []
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
            if expression.match(name, self._budget):
                best = index
        return self._keys[best] if best < len(self._keys) else None

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The keys that match none of the names."""
        matched = {index for name in names for index in self._literals(name)}
        matched |= {index for index, expression in self._others if self._any(expression, names)}
        known = set(names)
        return [key for index, key in enumerate(self._keys) if index not in matched and key not in known]

    def _any(self, expression: Expression, names: Iterable[str]) -> bool:
        return any(expression.match(name, self._budget) for name in names)

    def _literals(self, name: str) -> Iterator[int]:
        """The indices of the literal keys that match, in no order."""
        if "\n" in name:  # neither a dot nor the end of an expression is then what it seems
            yield from (i for i, key in enumerate(self._keys) if compiled(key).match(name, self._budget))
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
