"""Fleets: every adapter below a directory audited, compared with its family, and its duplicates found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.fleet._audit import audit as audit
    from lorakit.fleet._duplicates import Duplicate as Duplicate
    from lorakit.fleet._duplicates import DuplicateGroup as DuplicateGroup
    from lorakit.fleet._report import FleetReport as FleetReport
    from lorakit.fleet._rows import FleetAdapter as FleetAdapter
    from lorakit.fleet._rows import FleetFinding as FleetFinding
    from lorakit.fleet._written import write_csv as write_csv
    from lorakit.fleet._written import write_parquet as write_parquet
    from lorakit.fleet._written import write_sarif as write_sarif
else:
    __getattr__, __dir__, __all__ = attach(__name__)
