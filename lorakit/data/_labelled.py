"""Documents that each belong to a class: texts, or pairs of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit._checks import check_integer
from lorakit.data._loader import row_order
from lorakit.data._sources import name_of, read
from lorakit.errors import DataError

FIELDS = ("text", "text_pair", "label")


@dataclass(frozen=True)
class Labelled:
    """Documents, each once, in the order of their source: hash, content and class.

    `documents` are SHA-256 of the contents without the classes. `num_copies` counts rows that are left out because
    their content is there already.
    """

    documents: tuple[str, ...]
    contents: tuple[Any, ...]
    labels: tuple[int, ...]
    num_copies: int

    def chosen(self, keep: Callable[[str], bool]) -> Labelled:
        """The documents whose hash is one to keep."""
        places = [i for i, document in enumerate(self.documents) if keep(document)]
        return Labelled(
            tuple(self.documents[i] for i in places),
            tuple(self.contents[i] for i in places),
            tuple(self.labels[i] for i in places),
            self.num_copies,
        )


@dataclass(frozen=True)
class Inputs:
    """What a model gets: `examples` with `labels`, and the `collate_fn` that makes a batch of several of them."""

    examples: Sequence[Any]
    collate_fn: Callable[[list[Any]], Any]


def labelled(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    num_examples: int | None = None,
    shuffle_seed: int | None = None,
    start: int = 0,
    split: str | None = None,
    subset: str | None = None,
) -> Labelled:
    """The documents of a file, Dataset or dataset id.

    `columns` gives the columns of `text`, `label` and, for pairs, `text_pair`; by default they have these names. Labels
    are integers from 0. The other arguments are as in `lorakit.data.loader`.
    Raises: DataError for data that cannot be read, columns that are not there, and labels that are no class.
    """
    rows, name = read(source, split, subset), name_of(source)
    fields = _fields(rows.column_names, columns, name)
    order = row_order(len(rows), start, num_examples, shuffle_seed)
    found: dict[str, tuple[Any, int]] = {}
    for number, row in zip(order, rows.select_columns(sorted(set(fields.values()))).select(order), strict=True):
        place = f"Row {number + 1} of {name}"
        texts = tuple(_text(row[fields[field]], field, place) for field in FIELDS[:2] if field in fields)
        found.setdefault(_digest(texts), (texts, _label(row[fields["label"]], place)))
    contents, labels = zip(*found.values(), strict=True)
    return Labelled(tuple(found), contents, labels, len(order) - len(found))


def text_inputs(data: Labelled, tokenizer: Any, length: int) -> Inputs:
    """Tokens of the texts, cut to `length` (of a pair the longer text first), padded within each batch."""
    from transformers import DataCollatorWithPadding

    check_integer("length", length)
    sides = (list(side) for side in zip(*data.contents, strict=True))
    encoded = tokenizer(*sides, truncation=True, max_length=length)
    examples = [
        {name: values[i] for name, values in encoded.items()} | {"labels": label} for i, label in enumerate(data.labels)
    ]
    return Inputs(examples, DataCollatorWithPadding(tokenizer))


def _fields(present: Sequence[str], columns: Mapping[str, str] | None, name: str) -> dict[str, str]:
    fields = {field: field for field in FIELDS if field in present} if columns is None else dict(columns)
    unknown = [field for field in fields if field not in FIELDS]
    missing = [field for field in ("text", "label") if field not in fields]
    absent = [column for column in fields.values() if column not in present]
    if unknown or missing or absent:
        raise DataError(
            f"`columns` must name the columns of `text` and `label`, and of `text_pair` for pairs, as in "
            f'`columns={{"text": "sentence", "label": "label"}}`; got {fields}, and {name} has '
            f"{', '.join(map(repr, present))}."
        )
    return fields


def _text(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: `{field}` must be a string; got {type(value).__name__}.")
    return value


def _label(value: Any, place: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise DataError(f"{place}: `label` must be a class, an integer from 0; got {value!r}.")
    return number


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
