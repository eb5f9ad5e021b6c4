"""The demo's text: Python's documentation, split by document."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from lorakit._files import write_file
from lorakit.data import loader
from lorakit.demo._settings import DemoError, DemoSettings
from lorakit.evaluation._digests import document_digests

_SHARES = {"held_out": 0.25, "calibration": 0.25, "train": 0.5}


def split_documents(seed: int = 0) -> dict[str, list[str]]:
    """The documents of three parts, "train", "calibration" and "held_out", that share no document and no paragraph.

    Some documents quote others: paragraphs of one part that stand in another are taken out of the first.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    total = sum(len(topics[name]) for name in names)
    parts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for part, share in _SHARES.items():
        documents, size = [], 0
        while names and size < share * total:
            name = names.pop()
            paragraphs = topics[name].split("\n\n")
            documents.append("\n\n".join(p for p in paragraphs if " ".join(p.split()) not in seen))
            size += len(topics[name])
        seen |= {" ".join(p.split()) for document in documents for p in document.split("\n\n")}
        parts[part] = [document for document in documents if document.strip()]
    return parts


def passages(tokenizer: Any, documents: Sequence[str], count: int, *, length: int, seed: int = 0) -> Tensor:
    """The first `count` passages of `length` tokens of shuffled documents, (count, length): fewer if there are no more.

    Raises: DemoError if no document is that long.
    """
    found = [chunk for document in documents for chunk in _chunks(tokenizer(document)["input_ids"], length)]
    if not found:
        raise DemoError(f"No document is {length} tokens long; lower `length`.")
    random.Random(seed + 1).shuffle(found)
    return torch.tensor(found[:count])


def _chunks(ids: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - length + 1, length):
        yield ids[start : start + length]


@dataclass(frozen=True)
class DemoData:
    """Training passages in batches; calibration and held-out documents as files, one document a row.

    `used_documents` are the hashes of training and calibration documents, as a task on held-out documents has them.
    """

    train: tuple[Tensor, ...]
    calibration: Path
    held_out: Path
    counts: dict[str, int]
    used_documents: tuple[str, ...]


def prepare(tokenizer: Any, settings: DemoSettings, directory: Path) -> DemoData:
    """Split the text, and write calibration.jsonl and held-out.jsonl into `directory`.

    Raises: DemoError if no training document is as long as a passage.
    """
    parts = split_documents(settings.seed)
    wanted = settings.steps * settings.batch_size
    ids = passages(tokenizer, parts["train"], wanted, length=settings.length, seed=settings.seed)
    ids = ids.repeat(-(-wanted // len(ids)), 1)[:wanted]  # as many epochs as it takes
    limits = {"calibration": settings.calibration_documents, "held_out": settings.held_out_documents}
    files: dict[str, Path] = {}
    for part, limit in limits.items():
        parts[part] = parts[part][:limit]
        files[part] = directory / f"{part.replace('_', '-')}.jsonl"
        write_file(files[part], "".join(json.dumps({"text": text}) + "\n" for text in parts[part]))
    used = [*parts["train"], *parts["calibration"]]
    return DemoData(
        train=tuple(torch.split(ids, settings.batch_size)),
        calibration=files["calibration"],
        held_out=files["held_out"],
        counts={"train": len(ids), **{part: len(parts[part]) for part in limits}},
        used_documents=tuple(_hashes(used, tokenizer, settings)),
    )


def _hashes(documents: Sequence[str], tokenizer: Any, settings: DemoSettings) -> Iterator[str]:
    from datasets import Dataset

    rows = Dataset.from_dict({"text": list(documents)})
    for batch in loader(rows, tokenizer, length=settings.document_length, batch_size=1, progress=False):
        yield from document_digests(batch)
