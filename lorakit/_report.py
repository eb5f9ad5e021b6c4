"""The one form that all reports have: plain data, a table, a short text, HTML for notebooks, a figure, next steps."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from lorakit.errors import Finding, MissingExtraError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_HTML_ROWS = 20  # rows of a table in a notebook
_REPR_LINES = 10
_REPR_WIDTH = 160


class Report:
    """Base class of reports. A subclass is a frozen dataclass with ``repr=False`` that says what its headline is.

    What a subclass gives: `headline` and, where it has them, `details`, `next_steps`, `plot` and another `rows`.
    """

    @property
    def headline(self) -> str:
        """One line that says what was found."""
        raise NotImplementedError

    @property
    def details(self) -> tuple[str, ...]:
        """A few more lines, the most important first."""
        return ()

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do now, as shell commands and Python calls that can be pasted."""
        return ()

    @property
    def has_errors(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.severity == "error" for finding in getattr(self, "findings", ()))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON takes.

        A report about modules has `modules`, `findings` where there can be any, and everything else as `summary`.
        """
        data = {key: _plain(value) for key, value in asdict(self).items()}  # type: ignore[call-overload]
        if "modules" not in data:
            return data
        parts = {key: data.pop(key) for key in ("modules", "findings") if key in data}
        return {"modules": parts.pop("modules"), "summary": data, **parts}

    def rows(self) -> list[dict[str, Any]]:
        """The report's table, one mapping a row: by default one a module."""
        rows: list[dict[str, Any]] = self.to_dict().get("modules", [])
        return rows

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame.

        Raises: MissingExtraError (an ImportError) where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("`to_frame` needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def plot(self) -> Figure:
        """The report as a matplotlib Figure."""
        raise NotImplementedError(f"{type(self).__name__} has no figure.")

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {self.headline}", *(f"  {line}" for line in self.details)]
        if self.next_steps:
            lines.append(f"  next: {self.next_steps[0]}")
        if len(lines) > _REPR_LINES:
            lines = [*lines[: _REPR_LINES - 1], "  …"]
        return "\n".join(line if len(line) <= _REPR_WIDTH else f"{line[: _REPR_WIDTH - 1]}…" for line in lines)

    def _repr_html_(self) -> str:
        """HTML for notebooks; every name in it is escaped."""
        parts = [f"<p><b>{html.escape(type(self).__name__)}</b>: {html.escape(self.headline)}</p>"]
        if self.details:
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in self.details) + "</ul>")
        parts.append(_html_table(self.rows()))
        if self.next_steps:
            steps = "\n".join(self.next_steps)
            parts.append(f"<p>What to do next:</p><pre>{html.escape(steps)}</pre>")
        return "\n".join(part for part in parts if part)


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings."""
    severities = ("error", "warning", "info")
    return tuple(sorted(findings, key=lambda finding: severities.index(finding.severity)))


def field_names(report: Report) -> tuple[str, ...]:
    """The names of a report's fields."""
    return tuple(field.name for field in fields(report))  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the first rows, without columns of whole lists."""
    shown = [key for key in (rows[0] if rows else ()) if not isinstance(rows[0][key], Mapping | list)]
    if not shown:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in shown)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(key)))}</td>" for key in shown) + "</tr>"
        for row in rows[:_HTML_ROWS]
    )
    more = (
        f"<p>… and {len(rows) - _HTML_ROWS} more rows: see <code>to_frame()</code>.</p>"
        if len(rows) > _HTML_ROWS
        else ""
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
