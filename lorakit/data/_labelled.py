"""Documents with a label each: texts, pairs of texts, or images, and a class or a number."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorakit._checks import check_integer
from lorakit.data._loader import row_order
from lorakit.data._sources import name_of, read
from lorakit.errors import DataError, raised_as

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("text", "text_pair")
FIELDS = (*TEXTS, "image", "label")


@dataclass(frozen=True)
class Labelled:
    """Documents, each once, in the order of their source: hash, content and label.

    `documents` are SHA-256 of the contents without the labels. A content is a tuple of texts, or an image's encoded
    bytes. A label is a class from 0, or where some of the source's are no integers a number. `num_copies` counts rows
    that are left out because their content is there already.
    """

    documents: tuple[str, ...]
    contents: tuple[Any, ...]
    labels: tuple[float, ...]
    num_copies: int

    @property
    def has_images(self) -> bool:
        """Whether the documents are images."""
        return isinstance(self.contents[0], bytes)

    @property
    def has_classes(self) -> bool:
        """Whether the labels are classes and not numbers."""
        return isinstance(self.labels[0], int)

    @property
    def num_labels(self) -> int:
        """Outputs of a model that is trained on these: the largest class and 1, or one number."""
        return int(max(self.labels)) + 1 if self.has_classes else 1

    def chosen(self, keep: Callable[[str], bool]) -> Labelled:
        """The documents whose hash is one to keep."""
        places = [i for i, document in enumerate(self.documents) if keep(document)]
        return Labelled(
            tuple(self.documents[i] for i in places),
            tuple(self.contents[i] for i in places),
            tuple(self.labels[i] for i in places),
            self.num_copies,
        )


class Examples(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int) -> Any: ...


@dataclass(frozen=True)
class Inputs:
    """What a model gets: `examples` with `labels`, and the `collate_fn` that makes a batch of several of them."""

    examples: Examples
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
    """The documents of a file, Dataset or dataset id, or of a directory of images with a folder for each class.

    `columns` gives the columns of `text` (and, for pairs, `text_pair`) or `image`, and of `label`; by default they have
    these names. Classes are integers from 0. The other arguments are as in `lorakit.data.loader`.
    Raises: DataError for data that cannot be read, columns that are not there, and labels that are none.
    """
    name = name_of(source)
    rows = _folder(source, split) if _is_folder(source) else read(source, split, subset)
    fields = _fields(rows.column_names, columns, name)
    if "image" in fields:
        rows = _undecoded(rows, fields["image"], name)
    order = row_order(len(rows), start, num_examples, shuffle_seed)
    found: dict[str, tuple[Any, float]] = {}
    for number, row in zip(order, rows.select_columns(sorted(set(fields.values()))).select(order), strict=True):
        place = f"Row {number + 1} of {name}"
        content = _content({field: row[column] for field, column in fields.items()}, place)
        found.setdefault(_digest(content), (content, _label(row[fields["label"]], place)))
    contents, labels = zip(*found.values(), strict=True)
    return Labelled(tuple(found), contents, _of_one_kind(labels), len(order) - len(found))


def inputs_for(data: Labelled, processor: Any, length: int) -> Inputs:
    """The documents as a model takes them.

    `processor` is a tokenizer, or of images an image processor. Texts are cut to `length` tokens (of a pair the longer
    first) and padded within each batch.
    """
    from transformers import DataCollatorWithPadding

    check_integer("length", length)
    if data.has_images:
        pairs = zip(data.contents, data.labels, strict=True)
        return Inputs([{"image": image, "labels": label} for image, label in pairs], _ImageCollator(processor))
    sides = (list(side) for side in zip(*data.contents, strict=True))
    encoded = processor(*sides, truncation=True, max_length=length)
    examples = [
        {name: values[i] for name, values in encoded.items()} | {"labels": label} for i, label in enumerate(data.labels)
    ]
    return Inputs(examples, DataCollatorWithPadding(processor))


@dataclass(frozen=True)
class _ImageCollator:
    """Decodes images when their batch is made; a class, so that other processes can be sent it."""

    processor: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        images = [Image.open(io.BytesIO(example["image"])).convert("RGB") for example in examples]
        batch = dict(self.processor(images, return_tensors="pt"))
        return batch | {"labels": torch.tensor([example["labels"] for example in examples])}


def _is_folder(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and os.path.isdir(source)


def _folder(path: Any, split: str | None) -> Dataset:
    """A directory of images; its classes are the names of their folders, in the order of the alphabet."""
    import datasets

    where = os.path.abspath(os.fspath(path))
    what = f"{os.fspath(path)!r} cannot be read as a directory of images"
    with raised_as(DataError, what), tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(
            "imagefolder", data_dir=where, split=split or "train", cache_dir=cache, keep_in_memory=True
        )


def _undecoded(rows: Dataset, column: str, name: str) -> Dataset:
    import datasets

    if not isinstance(rows.features[column], datasets.Image):
        raise DataError(f"The column {column!r} of {name} must have images; got {rows.features[column]}.")
    return rows.cast_column(column, datasets.Image(decode=False))


def _fields(present: Sequence[str], columns: Mapping[str, str] | None, name: str) -> dict[str, str]:
    fields = {field: field for field in FIELDS if field in present} if columns is None else dict(columns)
    content = {*fields} - {"label"}
    known = content in ({"text"}, {"text", "text_pair"}, {"image"}) and "label" in fields
    if not known or any(column not in present for column in fields.values()):
        raise DataError(
            f"`columns` must name the columns of `label` and of `text`, `text` and `text_pair`, or `image`, as in "
            f'`columns={{"text": "sentence", "label": "label"}}`; got {fields}, and {name} has '
            f"{', '.join(map(repr, present))}."
        )
    return fields


def _content(values: Mapping[str, Any], place: str) -> Any:
    if "image" in values:
        image = values["image"] or {}
        content = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else None)
        if content is None:
            raise DataError(f"{place}: `image` is missing.")
        return content
    texts = tuple(values[field] for field in TEXTS if field in values)
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{place}: a text must be a string; got {type(text).__name__}.")
    return texts


def _label(value: Any, place: str) -> float:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise DataError(f"{place}: `label` must be a class, an integer from 0, or a number; got {value!r}.")
    if isinstance(number, int) and number < 0:
        raise DataError(f"{place}: `label` must be a class, an integer from 0; got {value!r}.")
    return number


def _of_one_kind(labels: Iterable[float]) -> tuple[float, ...]:
    found = tuple(labels)
    return tuple(map(float, found)) if any(isinstance(label, float) for label in found) else found


def _digest(content: Any) -> str:
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(encoded).hexdigest()
