"""Adapters of a fleet that are copies of each other: of the same files, of the same update, or nearly.

Sketches find the candidates; the exact cosine of the updates, from Gram matrices of the factors, decides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.adapters.adapter import Read
from lorakit.errors import LorakitError
from lorakit.fleet._cache import Cache
from lorakit.fleet._examine import Examined
from lorakit.fleet._rows import FleetAdapter
from lorakit.spectral import LowRank

_MARGIN = 4.0  # the sketches' 1 − cosine may be this many times the true one; beyond, a near duplicate is missed
_ROUNDING = 1e-3  # added to it, so that equal updates are candidates whatever their dtype
_CANDIDATES = 4  # that are verified for each adapter, the most similar first
_BLOCK = 1 << 24  # similarities that are in memory at a time


@dataclass(frozen=True)
class Duplicate:
    """An adapter that duplicates the first of its group.

    `kind`: "same_files" (config and weights are equal byte by byte), "same_update" (‖ΔW − ΔW'‖_F / ‖ΔW‖_F is at most
    two units of rounding of the coarser dtype, or 1e-5), or "near" (the cosine is at least `near`). `cosine` and
    `difference` are of all modules' updates together. `norm_ratio`: ‖ΔW'‖_F / ‖ΔW‖_F.
    """

    path: str
    kind: Literal["same_files", "same_update", "near"]
    cosine: float | None = None
    difference: float | None = None
    norm_ratio: float | None = None


@dataclass(frozen=True)
class DuplicateGroup:
    """An adapter, the first of its group in the fleet's order, and those that duplicate it."""

    path: str
    duplicates: tuple[Duplicate, ...]


@dataclass(frozen=True)
class Similarity:
    """The cosine of two whole updates, ‖ΔW_a − ΔW_b‖_F / ‖ΔW_a‖_F and ‖ΔW_b‖_F / ‖ΔW_a‖_F."""

    cosine: float
    difference: float
    norm_ratio: float


def find_duplicates(examined: Sequence[Examined], near: float, cache: str | None) -> tuple[DuplicateGroup, ...]:
    """Groups of duplicates. Each adapter is compared with the first adapters of the groups before it.

    Raises: OSError if the cache's directory cannot be written.
    """
    groups: dict[int, list[Duplicate]] = {}
    first: dict[str, int] = {}
    rows = [each.row for each in examined]
    for i, row in enumerate(rows):
        if row.sha256 is None:
            continue
        if row.sha256 in first:
            groups.setdefault(first[row.sha256], []).append(Duplicate(row.path, "same_files"))
        else:
            first[row.sha256] = i
    places, vectors = [], []
    for i in first.values():
        vector = examined[i].vector
        if vector is not None:
            places.append(i)
            vectors.append(vector)
    for i, j, found in _similar(rows, places, vectors, near, cache):
        # An adapter with copies of its own takes them along.
        copies = [
            Duplicate(copy.path, found.kind, found.cosine, found.difference, found.norm_ratio)
            for copy in groups.pop(i, [])
        ]
        groups.setdefault(j, []).extend([found, *copies])
    order = {row.path: place for place, row in enumerate(rows)}
    return tuple(
        DuplicateGroup(rows[i].path, tuple(sorted(groups[i], key=lambda each: order[each.path])))
        for i in sorted(groups)
    )


def _similar(
    rows: Sequence[FleetAdapter], places: Sequence[int], vectors: Sequence[Tensor], near: float, cache: str | None
) -> Iterator[tuple[int, int, Duplicate]]:
    """(adapter, first adapter of a group, what it is) for adapters whose files differ."""
    if not vectors:
        return
    sketches = torch.stack(list(vectors))
    floor = 1 - _MARGIN * (1 - near) - _ROUNDING
    joined: set[int] = set()  # positions of adapters that duplicate another one
    step = max(1, _BLOCK // len(sketches))
    for start in range(0, len(sketches), step):
        block = sketches[start : start + step] @ sketches[: start + step].mT
        for offset in range(len(block)):
            position = start + offset
            similar = block[offset, :position]
            candidates = (similar >= floor).nonzero().flatten()
            candidates = candidates[similar[candidates].argsort(descending=True, stable=True)]
            leaders = [other for other in candidates.tolist() if other not in joined][:_CANDIDATES]
            for other in leaders:
                i, j = places[position], places[other]
                found = _duplicate(rows[j], rows[i], near, cache)
                if found is not None:
                    joined.add(position)
                    yield i, j, found
                    break


def _duplicate(first: FleetAdapter, row: FleetAdapter, near: float, cache: str | None) -> Duplicate | None:
    """What `row` is to `first`; None if it is no duplicate, or one of them can no longer be read."""
    found = _similarity(first, row, cache)
    if found is None:
        return None
    same = found.difference <= max(1e-5, *(2 * _eps(name) for name in (*first.dtypes, *row.dtypes)))
    if same and not first.low_rank_part_only and not row.low_rank_part_only:
        return Duplicate(row.path, "same_update", **asdict(found))
    return Duplicate(row.path, "near", **asdict(found)) if same or found.cosine >= near else None


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def _similarity(first: FleetAdapter, row: FleetAdapter, cache: str | None) -> Similarity | None:
    records = None if cache is None else Cache(cache)
    key = hashlib.sha256(f"{first.sha256} {row.sha256}".encode()).hexdigest()
    record = records.read("pairs", key) if records else None
    if record is not None:
        return Similarity(**record)
    try:
        found = similarity(open_adapter(first.path), open_adapter(row.path))
    except (LorakitError, OSError):
        return None
    if records is not None and math.isfinite(found.cosine):
        records.write("pairs", key, asdict(found))
    return found


@torch.no_grad()
def similarity(a: Adapter, b: Adapter) -> Similarity:
    """How similar two adapters' low-rank updates are, over all modules, accumulated in float64.

    A module that only one of them has, or whose shapes differ, adds to that one's norm alone. One pair of modules is in
    memory at a time. Raises: AdapterFileError.
    """
    theirs: Mapping[str, AdapterModule] = {module.name: module for module in b.modules}
    inner = squared_a = squared_b = 0.0
    with a.source.reader() as read_a, b.source.reader() as read_b:
        for module in b.modules:
            update = _update(module, read_b)
            squared_b += float(update.inner(update).sum())
        for module in a.modules:
            update = _update(module, read_a)
            squared_a += float(update.inner(update).sum())
            other = theirs.get(module.name)
            if other is not None and _shape(other) == _shape(module):
                inner += float(update.inner(_update(other, read_b)).sum())
    if squared_a <= 0 or squared_b <= 0:
        return Similarity(0.0, math.inf, math.inf)
    distance = math.sqrt(max(0.0, squared_a + squared_b - 2 * inner))
    cosine = inner / math.sqrt(squared_a) / math.sqrt(squared_b)
    return Similarity(min(cosine, 1.0), distance / math.sqrt(squared_a), math.sqrt(squared_b / squared_a))


def _shape(module: AdapterModule) -> tuple[object, ...]:
    return module.kind, module.d_out, module.d_in, module.experts


def _update(module: AdapterModule, read: Read) -> LowRank:
    return LowRank(*module.read(read), module.scaling).to(dtype=torch.float64)
