"""A fleet's report as CSV, Parquet and SARIF files.

References: SARIF 2.1.0, OASIS Standard, 2020.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit._files import write_file
from lorakit._version import __version__
from lorakit.adapters.atomic import CONFIG_NAME
from lorakit.errors import MissingExtraError
from lorakit.fleet._report import FleetReport
from lorakit.fleet._rows import FleetAdapter

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_ROOT = "FLEET"


def write_csv(report: FleetReport, path: str | os.PathLike[str]) -> None:
    """Write a report's rows as CSV, one line for each adapter; lists are joined by spaces.

    Raises: MissingExtraError without pandas; OSError, and the file is then as it was before.
    """
    frame = report.to_frame()
    for name in frame.columns:
        frame[name] = [" ".join(value) if isinstance(value, list) else value for value in frame[name]]
    write_file(path, frame.to_csv(index=False).encode(errors="replace"))


def write_parquet(report: FleetReport, path: str | os.PathLike[str]) -> None:
    """Write a report's rows as Parquet, one row for each adapter.

    Raises: MissingExtraError without pandas and pyarrow; OSError, and the file is then as it was before.
    """
    frame = report.to_frame()
    content = io.BytesIO()
    try:
        frame.to_parquet(content, index=False)
    except ImportError as error:
        raise MissingExtraError("`write_parquet` needs pyarrow: pip install pyarrow") from error
    write_file(path, content.getvalue())


def write_sarif(report: FleetReport, path: str | os.PathLike[str]) -> None:
    """Write the findings as SARIF 2.1.0, which code hosts and editors show: one result for each adapter and code.

    Adapters that cannot be read are results of the rule "unreadable"; outliers and duplicates are notes.
    Raises: OSError; the file is then as it was before.
    """
    write_file(path, (json.dumps(to_sarif(report), indent=1, allow_nan=False) + "\n").encode(errors="replace"))


def to_sarif(report: FleetReport) -> dict[str, Any]:
    """The SARIF log of a report, as JSON data."""
    results = [result for row in report.adapters for result in _results(report, row)]
    rules = sorted({result["ruleId"] for result in results})
    for result in results:
        result["ruleIndex"] = rules.index(result["ruleId"])
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "lorakit",
                "version": __version__,
                "rules": [{"id": rule, "shortDescription": {"text": rule.replace("_", " ")}} for rule in rules],
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    if report.directory is not None:
        run["originalUriBaseIds"] = {_ROOT: {"uri": Path(report.directory).resolve().as_uri().rstrip("/") + "/"}}
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _results(report: FleetReport, row: FleetAdapter) -> Iterator[dict[str, Any]]:
    said = [(each.code, _LEVELS[each.severity], each.message) for each in row.findings]
    if row.error_type is not None:
        said.append(("unreadable", "error", f"{row.error_type}: {row.error}"))
    if row.unusual:
        said.append(("unusual", "note", f"Unusual in its family ({row.family}): {', '.join(row.unusual)}."))
    if row.duplicate_of is not None:
        said.append(("duplicate", "note", f"A duplicate of {row.duplicate_of}."))
    location = _location(report, row)
    for code, level, message in said:
        fingerprint = hashlib.sha256(f"{location['uri']} {code}".encode(errors="surrogateescape")).hexdigest()
        yield {
            "ruleId": code,
            "level": level,
            "message": {"text": message},
            "locations": [{"physicalLocation": {"artifactLocation": dict(location)}}],
            "partialFingerprints": {"adapterAndCode/v1": fingerprint},
        }


def _location(report: FleetReport, row: FleetAdapter) -> dict[str, str]:
    """The adapter's config where it has one, else its own path; relative to the fleet's directory."""
    config = os.path.join(row.path, CONFIG_NAME)
    path = config if os.path.isfile(config) else row.path
    if report.directory is not None:
        relative = os.path.relpath(path, report.directory).replace(os.sep, "/")
        return {"uri": urllib.parse.quote(relative, errors="surrogateescape"), "uriBaseId": _ROOT}
    if os.path.lexists(path):
        return {"uri": Path(path).absolute().as_uri()}
    return {"uri": f"hf://{urllib.parse.quote(path)}"}
