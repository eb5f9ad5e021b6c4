"""Calibration and selection examples from one loader, and the proof that no document is used twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor

from lorakit.data._loader import examples_for
from lorakit.data._sources import is_source
from lorakit.errors import EvaluationError, SurgeryError
from lorakit.evaluation import document_hashes
from lorakit.evaluation._digests import weights_digest


@dataclass(frozen=True)
class Splits:
    """Batches for calibration and for selection, and the hashes of their documents."""

    calibration: list[Any]
    selection: list[Any]
    documents: list[str]


def split(
    adapter: PeftModel,
    loader: Any,
    selection: Any,
    tokenizer: Any,
    *,
    num_examples: int,
    num_selection: int,
    progress: bool,
) -> Splits:
    """The first `num_examples` rows of a loader, and the next `num_selection`, or as many of `selection`.

    Raises: SurgeryError for too few rows, and batches that cannot be divided; EvaluationError for a document in both.
    """
    wanted = [num_examples] if selection is not None else [num_examples, num_selection]

    parts = _take(_examples(adapter, loader, tokenizer, sum(wanted), progress), wanted)
    if selection is not None:
        parts.append(batches_of(adapter, selection, tokenizer, num_examples=num_selection, progress=progress))
    calibration, chosen = parts
    if not calibration or not chosen:
        raise SurgeryError(
            f"`loader` must have more than {num_examples} examples, since the ones after these choose among the edits. "
            f"Lower `num_examples`, or pass `selection`."
        )
    hashes = [hashes_of(part) for part in parts]
    both = set(hashes[0]).intersection(hashes[1])
    if both:
        raise EvaluationError(
            f"{len(both)} documents are in calibration and in selection: the choice would favour what was fitted to "
            f"them. Take them out of one."
        )
    return Splits(calibration, chosen, [*hashes[0], *hashes[1]])


def batches_of(adapter: PeftModel, loader: Any, tokenizer: Any, *, num_examples: int, progress: bool) -> list[Any]:
    """The first `num_examples` rows of a loader, as batches. Raises: as `split`."""
    return _take(_examples(adapter, loader, tokenizer, num_examples, progress), [num_examples])[0]


def _examples(adapter: PeftModel, loader: Any, tokenizer: Any, count: int, progress: bool) -> Iterable[Any]:
    own = tokenizer if is_source(loader) else None  # batches are tokens already
    return examples_for(adapter, loader, own, num_examples=count, progress=progress)


def _take(batches: Iterable[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Consecutive parts of so many rows each; the last ones are shorter where the rows end."""
    parts: list[list[Any]] = [[] for _ in counts]
    left = list(counts)
    place = 0
    for batch in batches:
        start, rows = 0, _num_rows(batch)
        while start < rows and place < len(counts):
            stop = min(rows, start + left[place])
            parts[place].append(batch if (start, stop) == (0, rows) else _rows(batch, start, stop))
            left[place] -= stop - start
            start = stop
            place += left[place] == 0
        if place == len(counts):
            break
    return parts


def _num_rows(batch: Any) -> int:
    if isinstance(batch, Tensor) and batch.ndim:
        return len(batch)
    if isinstance(batch, Mapping):
        lengths = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
        if len(lengths) == 1:
            return lengths.pop()
    raise SurgeryError(
        f"A batch must be a tensor, or a mapping of tensors with one row an example; got {type(batch).__name__}."
    )


def _rows(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop]
    return {k: v[start:stop] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}


def hashes_of(batches: Sequence[Any]) -> list[str]:
    """The hashes of documents as `loss` has them; for batches without tokens, of each row's tensors."""
    found = []
    for batch in batches:
        if isinstance(batch, Mapping) and {"input_ids", "labels"} <= set(batch):
            found += document_hashes([batch])
            continue
        for i in range(_num_rows(batch)):
            row = _rows(batch, i, i + 1)
            found.append(weights_digest({"row": row} if isinstance(row, Tensor) else _tensors(row)))
    return found


def _tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in row.items() if isinstance(value, Tensor)}
