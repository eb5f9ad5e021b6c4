"""The form that all reports share: JSON data, a table, a short text, HTML for notebooks, a figure, and next steps."""

from __future__ import annotations

import html
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit._format import visible
from lorakit.errors import Finding, MissingExtraError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_HTML_ROWS = 20  # rows of a table in a notebook
_REPR_LINES = 10
_REPR_WIDTH = 160
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_NUMBER = re.compile(r"[-+]?[\d.,]+(?:e[-+]?\d+)?(?:–[\d.,]+)?|-|")  # or a range, or nothing

Item = TypeVar("Item")


@dataclass(frozen=True)
class Table:
    """A table for people: every cell is text, and the first column holds the names.

    `total`: the last row sums up the rows above it. `long`: HTML folds the table, and a terminal leaves it out.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    total: bool = False
    long: bool = False

    @classmethod
    def of(
        cls,
        title: str,
        columns: Sequence[tuple[str, Callable[[Item], str]]],
        items: Iterable[Item],
        *,
        note: str = "",
        total: bool = False,
        long: bool = False,
    ) -> Table:
        """A table with one row for each item; `columns` are headings and the functions that write the cells."""
        rows = tuple(tuple(write(item) for _, write in columns) for item in items)
        return cls(title, tuple(heading for heading, _ in columns), rows, note, total, long)

    def text(self) -> str:
        """The table as lines of text: columns of numbers are flush right, others flush left."""
        lines = [self.headings, *self.rows]
        numeric = [all(_NUMBER.fullmatch(row[i]) for row in self.rows) for i in range(len(self.headings))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headings))]
        padded = [
            [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)]
            for line in lines
        ]
        return "\n".join("  ".join(cells).rstrip() for cells in padded)


class Report:
    """Base class of reports. A subclass is a frozen dataclass with ``repr=False``.

    A subclass defines `headline` and, where they apply, `details`, `tables`, `next_steps`, `plot` and `rows`.
    """

    @property
    def title(self) -> str:
        """What the report is about; the heading on a terminal and in HTML."""
        return type(self).__name__

    @property
    def headline(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    @property
    def details(self) -> tuple[str, ...]:
        """A few more lines, the most important first."""
        return ()

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Shell commands and Python calls to run next; they work when pasted."""
        return ()

    @property
    def has_errors(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.severity == "error" for finding in getattr(self, "findings", ()))

    def to_dict(self) -> dict[str, Any]:
        """The report as data that `json.dumps(..., allow_nan=False)` accepts.

        A report about modules has the keys `modules`, `summary` and, if the report has findings, `findings`.
        """
        data = {key: plain(value) for key, value in asdict(self).items()}  # type: ignore[call-overload]
        if "modules" not in data:
            return data
        parts = {key: data.pop(key) for key in ("modules", "findings") if key in data}
        return {"modules": parts.pop("modules"), "summary": data, **parts}

    def rows(self) -> list[dict[str, Any]]:
        """The report's rows, by default one for each module."""
        rows: list[dict[str, Any]] = self.to_dict().get("modules", [])
        return rows

    def tables(self) -> list[Table]:
        """The tables that a terminal and HTML show."""
        return []

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame.

        Raises: MissingExtraError (an ImportError) if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("`to_frame` needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def plot(self) -> Figure:
        """The report as one matplotlib Figure."""
        raise NotImplementedError(f"{type(self).__name__} has no figure.")

    def figures(self) -> dict[str, Figure]:
        """The figures that `lorakit.lens.write_plots` and HTML pages have, by file name; by default `plot()` alone."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__.removesuffix("Report")).lower()
        return {name: self.plot()}

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {self.headline}", *(f"  {line}" for line in self.details)]
        if self.next_steps:
            lines.append(f"  next: {self.next_steps[0]}")
        if len(lines) > _REPR_LINES:
            lines = [*lines[: _REPR_LINES - 1], "  …"]
        shown = map(visible, lines)
        return "\n".join(line if len(line) <= _REPR_WIDTH else f"{line[: _REPR_WIDTH - 1]}…" for line in shown)

    def _repr_html_(self) -> str:
        """HTML for notebooks, with all text escaped."""
        parts = [f"<p><b>{html.escape(type(self).__name__)}</b>: {html.escape(self.headline)}</p>"]
        if self.details:
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in self.details) + "</ul>")
        tables = [table for table in self.tables() if not table.long] or [_table_of_rows(self.rows())]
        parts += [html_table(table, most=_HTML_ROWS) for table in tables if table.headings]
        if self.next_steps:
            steps = "\n".join(self.next_steps)
            parts.append(f"<p>What to do next:</p><pre>{html.escape(steps)}</pre>")
        return "\n".join(parts)


def html_table(table: Table, *, most: int | None = None) -> str:
    """A table as HTML, with all text escaped; with `most`, only that many of its rows."""
    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows[:most]
    )
    left_out = len(table.rows[:most]) - len(table.rows)
    more = f"<p>… and {-left_out} more rows: see <code>to_frame()</code>.</p>" if left_out else ""
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>{more}{note}"


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings sorted by severity: errors, then warnings, then information."""
    severities = ("error", "warning", "info")
    return tuple(sorted(findings, key=lambda finding: severities.index(finding.severity)))


def counted(findings: Sequence[Finding]) -> str:
    """How many errors and warnings there are, as text: "1 error, 2 warnings" or "no errors or warnings"."""
    counts = [(sum(f.severity == kind for f in findings), kind) for kind in ("error", "warning")]
    return ", ".join(f"{n} {kind}{'s' * (n > 1)}" for n, kind in counts if n) or "no errors or warnings"


def shell_argument(path: str, suffix: str = "") -> str | None:
    """A path or Hub id quoted for a shell, or None for an adapter that exists only in memory.

    With `suffix`, the path of a new directory beside it (for a Hub id, in the current directory) whose name ends so.
    """
    exists = os.path.exists(path)
    if not exists and not _HUB_ID.fullmatch(path):
        return None
    if suffix:
        directory = os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else path.rstrip("/")
        path = (directory if exists else directory.rpartition("/")[2]) + suffix
    return shlex.quote(path)


def plain(value: Any) -> Any:
    """`value` with tuples as lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _table_of_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows as a table, without the columns that hold lists or mappings."""
    shown = [key for key in (rows[0] if rows else ()) if not isinstance(rows[0][key], Mapping | list)]
    return Table("", tuple(map(str, shown)), tuple(tuple(_cell(row.get(key)) for key in shown) for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
