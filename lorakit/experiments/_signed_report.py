"""What the two kinds of bench reports share: a signed JSON file, a page, and a figure of differences."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lorakit._figures import escape_mathtext, new_figure
from lorakit._files import write_file
from lorakit._report import Report
from lorakit.errors import EvaluationError, Finding
from lorakit.evaluation._digests import digest
from lorakit.lens.render.html import write_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
_HTML_NAME = "report.html"


class SignedReport(Report):
    """Base class of a bench's report, a frozen dataclass whose `sha256` is of everything else in its JSON file."""

    _kind: ClassVar[str]  # what messages call it
    _format: ClassVar[str]
    _file: ClassVar[str]
    sha256: str

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the JSON file and `report.html`, each whole or not at all."""
        content = json.dumps({"format": self._format, **self.to_dict()}, indent=1, allow_nan=False)
        write_file(Path(directory, self._file), content)
        write_html(self, Path(directory, _HTML_NAME))

    def signed(self) -> str:
        """SHA-256 of everything but `sha256`."""
        return digest({key: value for key, value in self.to_dict().items() if key != "sha256"})

    def _check_signature(self) -> None:
        if self.signed() != self.sha256:
            raise EvaluationError(f"The {self._kind} does not verify: its content is not what its SHA-256 says.")


def read_signed(path: str | os.PathLike[str], cls: type[SignedReport], build: Callable[[dict[str, Any]], T]) -> T:
    """A report from its JSON file; not verified. `build` gets the content, with tuples in scores, seeds and findings.

    Raises: EvaluationError where the file is none.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        if content.pop("format") != cls._format:
            raise ValueError("another format")
        content["seeds"] = tuple(content["seeds"])
        content["findings"] = tuple(Finding(**row) for row in content["findings"])
        content["scores"] = tuples_of(content["scores"])
        return build(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{os.fspath(path)!r} is not a {cls._kind} of lorakit's: {error}.") from error


def tuples_of(value: Any) -> Any:
    """JSON data with tuples for its lists."""
    if isinstance(value, dict):
        return {key: tuples_of(item) for key, item in value.items()}
    return tuple(map(tuples_of, value)) if isinstance(value, list) else value


def same_figures(a: Any, b: Any) -> bool:
    """Whether two figures are the same but for another machine's rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_figures(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_figures, a, b))
    return bool(a == b)


@dataclass(frozen=True)
class DrawnDifference:
    """A row of a panel: a difference from the reference with its bounds, and those of the seeds."""

    label: str
    color: str
    difference: float
    lower: float
    upper: float
    seeds: Sequence[float]


def difference_panels(count: int, rows: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels side by side, high enough for so many rows."""
    figure = new_figure(3.5 + 4.5 * count, 1.6 + 0.42 * rows)
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def draw_differences(axes: Axes, rows: Sequence[DrawnDifference], margin: float | None, *, title: str, of: str) -> None:
    """One row below the other: differences of what `of` says, the bounds, the seeds, and the margin if there is one."""
    for place, row in enumerate(rows):
        error = [[row.difference - row.lower], [row.upper - row.difference]]
        axes.errorbar([row.difference], [place], xerr=error, fmt="o", capsize=4, color=row.color)
        axes.plot(row.seeds, [place] * len(row.seeds), "|", color="black", markersize=9)
    if margin is not None:
        axes.axvline(-margin, color="black", linestyle="--", linewidth=1, label=f"margin {margin:g}")
        axes.legend(fontsize=8)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(rows)), [escape_mathtext(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=escape_mathtext(f"{of}; short bars are the seeds"), title=escape_mathtext(title))
