"""What is unusual within a family: adapters of one base model with the same modules and ranks.

References: Iglewicz & Hoaglin, "How to Detect and Handle Outliers", 1993 (modified z-scores above 3.5).
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace

from lorakit._format import extent
from lorakit.fleet._rows import METRICS, FleetAdapter

OUTLIER_ABOVE = 3.5
SMALLEST_FAMILY = 8  # in a smaller one, nothing is called unusual
_LOGARITHMIC = {"frobenius_norm", "concentration"}  # these spread over orders of magnitude


def with_families(rows: Sequence[FleetAdapter]) -> tuple[FleetAdapter, ...]:
    """The rows with their family, and their percentiles and outliers in it."""
    members: dict[tuple[str | None, str], list[int]] = {}
    for i, row in enumerate(rows):
        if row.module_set is not None:
            members.setdefault((row.base_model, row.module_set), []).append(i)
    found = list(rows)
    for (base, module_set), indices in members.items():
        family = [rows[i] for i in indices]
        name = (
            f"{base or 'unknown base'}, r = {extent(family[0].ranks)}, {family[0].modules} modules ({module_set[:6]})"
        )
        percentiles: list[dict[str, float]] = [{} for _ in indices]
        unusual: list[list[str]] = [[] for _ in indices]
        for metric in METRICS:
            values = [getattr(row, metric) for row in family]
            known = [(place, float(value)) for place, value in enumerate(values) if value is not None]
            _place(metric, known, percentiles, unusual)
        for i, places, outliers in zip(indices, percentiles, unusual, strict=True):
            found[i] = replace(rows[i], family=name, percentiles=places, unusual=tuple(outliers))
    return tuple(found)


def _place(
    metric: str, known: list[tuple[int, float]], percentiles: list[dict[str, float]], unusual: list[list[str]]
) -> None:
    values = sorted(value for _, value in known)
    for place, value in known:
        middle = (bisect_left(values, value) + bisect_right(values, value)) / 2
        percentiles[place][metric] = round(100 * middle / len(values), 2)
    if len(values) < SMALLEST_FAMILY:
        return
    scaled = [_scale(metric, value) for _, value in known]
    for (place, _), score in zip(known, modified_z_scores(scaled), strict=True):
        if abs(score) > OUTLIER_ABOVE:
            unusual[place].append(metric)


def _scale(metric: str, value: float) -> float:
    return math.log(value) if metric in _LOGARITHMIC and value > 0 else value


def modified_z_scores(values: Sequence[float]) -> list[float]:
    """0.6745 (x − median) / MAD; where more than half are equal, (x − median) / (1.2533 · mean |x − median|)."""
    middle = statistics.median(values)
    distances = [abs(value - middle) for value in values]
    spread = statistics.median(distances) / 0.6745
    if spread <= 1e-9 * max(map(abs, values)):  # rounding only
        spread = 1.253314 * statistics.fmean(distances)
    if spread <= 1e-9 * max(map(abs, values)):
        return [0.0] * len(values)
    return [(value - middle) / spread for value in values]
