"""What a lower rank may cost in loss, from the loss's curvature.

If the adapter's weights are a minimum of a loss that is L-smooth and μ-strongly convex around them, a cut of ΔW to
rank r raises the loss by at least (μ/2) Σ_{i>r} σ_i² and at most (L/2) Σ_{i>r} σ_i².

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, section "Error Analysis".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorakit._checks import preview
from lorakit.adapters.keys import without_prefix
from lorakit.errors import Finding
from lorakit.spectral import loss_gap_bound

_LARGEST = 1e100  # so that no bound overflows
_FACTORS = "adapter"  # what HessianSpectrum is of if it is about factors, not weights


class CurvatureReport(Protocol):
    """A report with L and μ; `lorakit.experiments.pilot.HessianSpectrum` of a module is one."""

    @property
    def of(self) -> str | None: ...
    @property
    def smoothness(self) -> float: ...
    @property
    def strong_convexity(self) -> float | None: ...


@dataclass(frozen=True)
class Curvature:
    """`smoothness` L and `strong_convexity` μ of a loss near some weights; a `HessianSpectrum` has measured ones.

    They bound the Hessian's eigenvalues, L their absolute values from above and μ them from below; μ is None where it
    is not known. `of` is the module whose weight they are about; None: all the adapter's weights together.

    Raises: ValueError for numbers that are negative or above 1e100, and for μ above L.
    """

    smoothness: float
    strong_convexity: float | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        for name in ("smoothness", "strong_convexity"):
            value = getattr(self, name)
            if name == "strong_convexity" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value <= _LARGEST):
                raise ValueError(f"`{name}` must be a number from 0 to {_LARGEST:g}; got {value!r}.")
        if self.strong_convexity is not None and self.strong_convexity > self.smoothness:
            raise ValueError(
                f"`strong_convexity` (μ) must be at most `smoothness` (L); got {self.strong_convexity:g} and "
                f"{self.smoothness:g}."
            )


CurvatureSource = CurvatureReport | Sequence[CurvatureReport]


@dataclass(frozen=True)
class LossGap:
    """How much the loss may rise if ΔW is cut, in units of the loss: a local estimate.

    `of` is the module that is cut, while all others stay as they are; None: all are cut together. `lower` is None
    where μ is not known.
    """

    of: str | None
    lower: float | None
    upper: float

    @property
    def where(self) -> str:
        """What is cut, in words."""
        return "all modules together" if self.of is None else self.of


def read_curvature(curvature: CurvatureSource | None, names: Sequence[str]) -> tuple[Curvature, ...]:
    """One curvature of all weights, or one of each of some modules of the adapter, whose modules' names are given.

    Raises: TypeError for anything without L and μ; ValueError for numbers that are not allowed, an adapter's factors,
    modules that are unknown or named twice, and all weights beside single modules.
    """
    if curvature is None:
        return ()
    given = curvature if isinstance(curvature, Sequence) else [curvature]
    if not given:
        raise ValueError("`curvature` must have at least one; got an empty list.")
    found = []
    for one in given:
        if not all(hasattr(one, name) for name in ("of", "smoothness", "strong_convexity")):
            raise TypeError(
                f"`curvature` must be a HessianSpectrum of a module, a lorakit.lens.Curvature, or a list of them; got "
                f"{type(one).__name__}."
            )
        if one.of == _FACTORS and _FACTORS not in names:
            raise ValueError(
                "`curvature` must be about weights; this HessianSpectrum is about an adapter's factors. Measure it "
                "with `module=`, on the base model or on one that the adapter is merged into."
            )
        of = None if one.of is None else without_prefix(one.of)
        found.append(Curvature(one.smoothness, one.strong_convexity, of))
    unknown = [one.of for one in found if one.of is not None and one.of not in names]
    if unknown:
        raise ValueError(f"`curvature` must be of the adapter's modules, {preview(names)}; got {preview(unknown)}.")
    if len({one.of for one in found}) < len(found):
        raise ValueError("`curvature` must have each module once, and one of all weights at most.")
    if len(found) > 1 and any(one.of is None for one in found):
        raise ValueError("`curvature` must be one of all weights together, or of modules; got both.")
    return tuple(found)


class Bounded(Protocol):
    """A row about a module whose update may be known in part only."""

    @property
    def module_name(self) -> str: ...
    @property
    def low_rank_part_only(self) -> bool: ...


def about_partial_updates(curvature: Sequence[Curvature], rows: Sequence[Bounded]) -> Iterator[Finding]:
    """Information on the modules that a curvature is about, but whose update is known in part only."""
    bounded = [row for row in rows if any(one.of in (None, row.module_name) for one in curvature)]
    partial = [row.module_name for row in bounded if row.low_rank_part_only]
    if partial:
        message = (
            f"Without the base weights {len(partial)} modules have no bound on the loss, since only the low-rank part "
            f"of their update is known: {preview(partial)}"
        )
        yield Finding("info", "no_loss_gap", None, message)


def loss_gap(curvature: Curvature, spectra: Sequence[Sequence[float]], ranks: Sequence[int]) -> LossGap:
    """The bounds for updates with these singular values, each cut to its rank."""
    tail = [
        float(loss_gap_bound(torch.tensor(sigma, dtype=torch.float64), rank, 1.0))
        for sigma, rank in zip(spectra, ranks, strict=True)
    ]
    mu = curvature.strong_convexity
    return LossGap(curvature.of, None if mu is None else mu * sum(tail), curvature.smoothness * sum(tail))
