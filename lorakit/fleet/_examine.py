"""Examine adapters one after the other: what a worker of a fleet's audit does."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import lens, serving
from lorakit.adapters import open_adapter
from lorakit.adapters.read import download_adapter
from lorakit.errors import AdapterFileError
from lorakit.fleet._cache import Cache, Files
from lorakit.fleet._rows import FleetAdapter, FleetFinding, broken, measured
from lorakit.fleet._sketch import sketch

_TUPLES = ("ranks", "dtypes", "served_wrong", "refused_by")


@dataclass(frozen=True)
class Examined:
    """The row of an adapter, and the bytes of its sketch in float32; none if it has no sketch."""

    row: FleetAdapter
    sketch: bytes | None = None

    @property
    def vector(self) -> Tensor | None:
        """The sketch, divided by its norm."""
        if self.sketch is None:
            return None
        values = torch.frombuffer(bytearray(self.sketch), dtype=torch.float32)
        unit: Tensor = values / torch.linalg.vector_norm(values)
        return unit


def examine_all(paths: Sequence[str], cache: str | None) -> list[Examined]:
    """`examine` for several adapters, in their order."""
    return [examine(path, cache) for path in paths]


def examine(path: str, cache: str | None) -> Examined:
    """The row of one adapter, from the cache if its files are unchanged. An adapter that cannot be read has a row too.

    Such rows are not cached, since the cause may be outside of the files. Raises: OSError if the cache's directory
    cannot be written.
    """
    records = None if cache is None else Cache(cache)
    try:
        source = Path(path) if os.path.lexists(path) else download_adapter(path)
        files = Files.of(source)
        sha256 = (records.known_hash(files) if records else None) or files.sha256()
        record = records.read("records", sha256) if records else None
        known = record is not None
        if record is None:
            record = _record(source)
            if Files.of(source).stamp != files.stamp:
                raise AdapterFileError(f"{path!r} was changed while it was read. Audit it again.")
    except Exception as error:  # whatever is wrong with one adapter, the fleet's audit goes on
        return Examined(broken(path, error))
    if records is not None:
        if not known:
            records.write("records", sha256, record)
        if records.known_hash(files) is None:
            records.remember(files, sha256)
    found = _from_record(record)
    return replace(found, row=replace(found.row, path=path, sha256=sha256, size_bytes=files.size))


def _record(source: Path) -> dict[str, Any]:
    """What is measured of an adapter, as JSON data; nothing in it depends on where the files are.

    Raises: AdapterFileError, UnsupportedModelError.
    """
    view = open_adapter(source)
    report = lens.audit(view, by="expert")
    wrong = any(finding.severity == "error" for finding in view.findings)
    row = measured(view, report, () if wrong else serving.check_all(view))
    row["findings"] = [asdict(finding) for finding in row["findings"]]
    values = sketch(view)
    if values is not None:  # only its direction is needed, and float32 holds that whatever the size
        values = values / torch.linalg.vector_norm(values)
        return {"row": row, "sketch": base64.b64encode(values.float().numpy().tobytes()).decode()}
    return {"row": row, "sketch": None}


def _from_record(record: dict[str, Any]) -> Examined:
    row = dict(record["row"])
    for name in _TUPLES:
        row[name] = None if row[name] is None else tuple(row[name])
    row["findings"] = tuple(FleetFinding(**finding) for finding in row["findings"])
    encoded = record["sketch"]
    return Examined(FleetAdapter(path="", **row), None if encoded is None else base64.b64decode(encoded))
