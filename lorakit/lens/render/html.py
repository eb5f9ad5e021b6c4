"""A report as one HTML file that loads nothing from elsewhere and runs no scripts."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lorakit._figures import png_bytes
from lorakit._files import write_file
from lorakit._report import Report, Table, html_table
from lorakit._version import __version__
from lorakit.errors import Finding

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .4rem 0 }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd } th { vertical-align: bottom }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin-top: 1rem } img { display: block; max-width: 100%; height: auto; margin: 1rem 0 }
.findings td { text-align: left; vertical-align: top; overflow-wrap: anywhere }
.error { color: #b00020; font-weight: 600 } .warning { color: #8a5a00; font-weight: 600 } .info { color: #555 }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto }
"""
_LONG_ROWS = 2000  # of a folded table
_SHOWN = 100  # findings of one kind
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_html(
    report: Report, path: str | os.PathLike[str], *, sections: Mapping[str, Report] = MappingProxyType({})
) -> None:
    """Write a report as one self-contained HTML file; missing parent directories are made.

    `sections` are more reports by their headings, each a section of the page without its next steps.
    Raises: OSError; the file is then as it was before.
    """
    write_file(path, to_html(report, sections))


def to_html(report: Report, sections: Mapping[str, Report] = MappingProxyType({})) -> str:
    """A report as an HTML page with all text escaped: details, findings, tables, figures and next steps.

    So that a browser opens it for any number of modules, a table has 2,000 rows at most and a kind of findings 100.
    """
    parts = [f"<h1>{_escape(report.title)}</h1>", *_content(report)]
    for heading, section in sections.items():
        parts += [f"<h2>{_escape(heading)}</h2>", *_content(section, level=3)]
    if report.next_steps:
        parts.append("<h2>Next steps</h2><pre>" + _escape("\n".join(report.next_steps)) + "</pre>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_escape(report.title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f'<p class="info">lorakit {_escape(__version__)}</p>\n</body></html>\n'
    )


def _content(report: Report, level: int = 2) -> list[str]:
    """What stands below a report's title, but its next steps."""
    parts = [f"<p><b>{_escape(report.headline)}</b></p>"]
    if report.details:
        parts.append("<ul>" + "".join(f"<li>{_escape(line)}</li>" for line in report.details) + "</ul>")
    if hasattr(report, "findings"):
        parts += [f"<h{level}>Findings</h{level}>", _findings(report.findings)]
    tables = report.tables()
    parts += [_table(table) for table in tables if not table.long]
    parts += [_picture(name, png_bytes(figure, dpi=144)) for name, figure in report.figures().items()]
    return [*parts, *(_folded(table) for table in tables if table.long)]


def _escape(text: object) -> str:
    return html.escape(str(text))


def _table(table: Table) -> str:
    return f'<div class="wide">{html_table(table, most=_LONG_ROWS)}</div>'


def _folded(table: Table) -> str:
    summary = f"{_escape(table.title)} ({len(table.rows)} rows)"
    return f"<details><summary>{summary}</summary>{_table(table)}</details>"


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>None.</p>"
    kinds: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        kinds.setdefault((finding.severity, finding.code), []).append(finding.message)
    rows = []
    for (severity, code), messages in kinds.items():
        shown = messages[:_SHOWN]
        if len(messages) > _SHOWN:
            shown.append(f"… and {len(messages) - _SHOWN} more")
        cells = f'<td class="{severity}">{severity}</td><td>{_escape(code)}</td>'
        rows += [f"<tr>{cells}<td>{_escape(message)}</td></tr>\n" for message in shown]
    return f'<table class="findings"><tbody>\n{"".join(rows)}</tbody></table>'


def _picture(name: str, png: bytes) -> str:
    return f'<img alt="{_escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
