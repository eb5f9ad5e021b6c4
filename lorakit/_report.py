"""What all reports have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from lorakit.errors import Finding


class WithFindings:
    """A report with findings."""

    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.severity == "error" for finding in self.findings)


def in_parts(report: Any) -> dict[str, Any]:
    """A report as plain data: its `modules`, its `findings`, and all else as `summary`."""
    whole = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(report).items()}
    modules, findings = whole.pop("modules"), whole.pop("findings")
    return {"modules": modules, "summary": whole, "findings": findings}


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings."""
    severities = ("error", "warning", "info")
    return tuple(sorted(findings, key=lambda finding: severities.index(finding.severity)))
