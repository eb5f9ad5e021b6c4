"""An audit as one HTML file that needs nothing else: no network, no scripts, figures as inline SVG."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit._format import count, number
from lorakit._version import __version__
from lorakit.lens.render.figures import Curve, Heatmap, Spectrum, energy_curves, heatmaps, spectra
from lorakit.lens.render.text import columns_of, facts, module_columns, suggestion_columns

if TYPE_CHECKING:
    from lorakit.lens.static.report import AuditReport

# viridis, at even distances
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_LINES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd } th { vertical-align: bottom }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
.wide { overflow-x: auto } svg { display: block; max-width: 100%; height: auto; margin: .5rem 0 1.2rem }
svg text { font: 11px system-ui, sans-serif; fill: #333 } svg .title { font-size: 13px; font-weight: 600 }
.findings td { text-align: left; vertical-align: top; overflow-wrap: anywhere }
.error { color: #b00020; font-weight: 600 } .warning { color: #8a5a00; font-weight: 600 } .info { color: #555 }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem } dd { margin: 0; overflow-wrap: anywhere }
"""


def write_html(report: AuditReport, path: str | os.PathLike[str]) -> None:
    """Write the report as one self-contained HTML file, whole or not at all."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(to_html(report), encoding="utf-8", errors="replace")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def to_html(report: AuditReport) -> str:
    """The report as a page of HTML; every name in it is escaped."""
    parts = [f"<h1>Audit of {_e(report.path)}</h1>", "<dl>"]
    parts += [f"<dt>{_e(label)}</dt><dd>{_e(value)}</dd>" for label, value in facts(report)]
    parts.append("</dl>")
    parts += ["<h2>Findings</h2>", _findings(report)]
    if report.roles:
        columns = columns_of(report)
        rows = [[render(group) for _, render in columns] for group in (*report.roles, report.total)]
        parts += ["<h2>By role</h2>", _table([heading for heading, _ in columns], rows)]
    if report.suggestions:
        named = suggestion_columns()
        parts += [
            "<h2>Suggested ranks</h2>",
            _table([heading for heading, _ in named], [[render(s) for _, render in named] for s in report.suggestions]),
        ]
    maps = heatmaps(report)
    if maps:
        parts += ["<h2>Layer by role</h2>", *map(_heatmap, maps)]
    found = spectra(report)
    if found:
        parts += ["<h2>Spectra</h2>", _spectra(found)]
    curves = energy_curves(report)
    if curves:
        parts += ["<h2>Energy against parameters</h2>", _curves(curves, report)]
    by_module = module_columns(report)
    rows = [[render(module) for _, render in by_module] for module in report.modules]
    if rows:
        table = _table([heading for heading, _ in by_module], rows)
        parts += [f"<h2>Modules</h2><details><summary>{len(rows)} modules</summary>{table}</details>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Audit of {_e(report.path)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f"<p class=info>lorakit {_e(__version__)}; norms and ranks are those of ΔW, scaling included.</p>\n"
        "</body></html>\n"
    )


def _e(value: object) -> str:
    return html.escape(str(value))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _findings(report: AuditReport) -> str:
    if not report.findings:
        return "<p>None.</p>"
    rows = "".join(
        f'<tr><td class="{f.severity}">{f.severity}</td><td>{_e(f.code)}</td><td>{_e(f.message)}</td></tr>\n'
        for f in report.findings
    )
    return f'<table class="findings"><tbody>\n{rows}</tbody></table>'


def _svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{_e(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", cls: str = "") -> str:
    name = f' class="{cls}"' if cls else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{_e(text)}</text>'


def _colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    i = min(int(place), len(_COLOURS) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(_COLOURS[i], _COLOURS[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _heatmap(heatmap: Heatmap) -> str:
    cell, left, top = 22.0, 110.0, 26.0
    low, high = heatmap.extent
    across, down = len(heatmap.layers), len(heatmap.groups)
    parts = [_text(0, 14, heatmap.title, cls="title")]
    for j, group in enumerate(heatmap.groups):
        parts.append(_text(left - 6, top + cell * (j + 0.68), _short(group), "end"))
        for i, value in enumerate(heatmap.values[j]):
            fill = "#eeeeee" if value is None else _colour((value - low) / (high - low) if high > low else 0.5)
            parts.append(
                f'<rect x="{left + cell * i:g}" y="{top + cell * j:g}" width="{cell - 1:g}" height="{cell - 1:g}" '
                f'fill="{fill}"><title>{_e(group)}, layer {heatmap.layers[i]}: {number(value)}</title></rect>'
            )
    every = max(1, across // 32)
    bottom = top + cell * down
    parts += [
        _text(left + cell * (i + 0.5), bottom + 12, str(heatmap.layers[i]), "middle") for i in range(0, across, every)
    ]
    parts.append(_text(left - 6, bottom + 12, "layer", "end"))
    parts += [
        f'<rect x="{left + 6 * i:g}" y="{bottom + 20:g}" width="6" height="10" fill="{_colour(i / 19)}"/>'
        for i in range(20)
    ]
    parts += [
        _text(left - 6, bottom + 29, number(low), "end"),
        _text(left + 126, bottom + 29, number(high)),
    ]
    return _svg(max(left + cell * across, 420), bottom + 36, parts, heatmap.title)


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`."""
    size = 10.0 ** math.floor(math.log10(end))
    step = next(size * factor for factor in (0.1, 0.2, 0.5, 1, 2) if end / (size * factor) < 8)
    return [step * i for i in range(int(end / step + 1e-9) + 1)]


class _Axes:
    """A plot's frame, with ticks; both axes start at 0."""

    left, top, width, height = 60.0, 12.0, 560.0, 300.0

    def __init__(self, x_max: float, y_max: float, x_label: str, y_label: str) -> None:
        self.x_max, self.y_max = x_max or 1.0, y_max or 1.0
        self.parts = [
            f'<rect x="{self.left:g}" y="{self.top:g}" width="{self.width:g}" height="{self.height:g}" fill="none" '
            f'stroke="#999"/>'
        ]
        for tick in _ticks(self.x_max):
            self.parts.append(_text(self.point(tick, 0)[0], self.top + self.height + 15, count(tick), "middle"))
        for tick in _ticks(self.y_max):
            y = self.point(0, tick)[1]
            self.parts += [
                f'<line x1="{self.left:g}" x2="{self.left + self.width:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>',
                _text(self.left - 6, y + 4, number(tick), "end"),
            ]
        middle = self.left + self.width / 2
        self.parts += [
            _text(middle, self.top + self.height + 32, x_label, "middle"),
            f'<g transform="rotate(-90 14 {self.top + self.height / 2:g})">'
            + _text(14, self.top + self.height / 2, y_label, "middle")
            + "</g>",
        ]

    def point(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.width * x / self.x_max, self.top + self.height * (1 - y / self.y_max)

    def path(self, xs: Iterable[float], ys: Iterable[float]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*self.point(x, y)) for x, y in zip(xs, ys, strict=True))

    def legend(self, i: int, label: str, colour: str) -> None:
        x, y = self.left + self.width + 16, self.top + 12 + 18 * i
        self.parts.append(f'<rect x="{x:g}" y="{y - 8:g}" width="14" height="8" fill="{colour}"/>')
        self.parts.append(_text(x + 20, y, _short(label)))

    def svg(self, label: str) -> str:
        return _svg(self.left + self.width + 190, self.top + self.height + 40, self.parts, label)


def _spectra(found: list[Spectrum]) -> str:
    longest = max(len(spectrum.median) for spectrum in found)
    axes = _Axes(longest, 1.0, "component k", "σ_k / σ_1: median, 10 to 90 % shaded")
    for i, spectrum in enumerate(found):
        colour = _LINES[i % len(_LINES)]
        ks = range(1, len(spectrum.median) + 1)
        band = axes.path([*ks, *reversed(ks)], [*spectrum.low, *reversed(spectrum.high)])
        axes.parts += [
            f'<polygon points="{band}" fill="{colour}" fill-opacity="0.10"/>',
            f'<polyline points="{axes.path(ks, spectrum.median)}" fill="none" stroke="{colour}" stroke-width="1.6">'
            f"<title>{_e(spectrum.group)}</title></polyline>",
        ]
        axes.legend(i, spectrum.group, colour)
    return axes.svg("Spectra by role")


def _curves(curves: list[Curve], report: AuditReport) -> str:
    axes = _Axes(max(curve.parameters[-1] for curve in curves), 1.0, "parameters", "share of Σ ‖ΔW‖_F² kept")
    for i, curve in enumerate(curves):
        points = axes.path(curve.parameters, curve.energy)
        axes.parts.append(f'<polyline points="{points}" fill="none" stroke="{_LINES[i]}" stroke-width="1.8"/>')
        axes.legend(i, curve.label, _LINES[i])
    for i, suggestion in enumerate(report.suggestions, len(curves)):
        x, y = axes.point(suggestion.parameters, suggestion.energy_kept)
        colour = _LINES[i % len(_LINES)]
        axes.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{_e(suggestion.policy)}</title></circle>'
        )
        axes.legend(i, suggestion.policy, colour)
    return axes.svg("Energy against parameters")


def _short(text: str) -> str:
    return text if len(text) <= 22 else f"{text[:21]}…"
