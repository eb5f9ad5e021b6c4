"""Two adapters beside each other: which directions their updates share, whether they agree, and what a merge would do.

Everything is of ΔW, not of the factors: B → B R, A → R⁻¹ A changes nothing.
References: Björck & Golub 1973 (principal angles); Gradience (overlap, conflict, dominance).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import preview
from lorakit._report import Report, ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.errors import Finding
from lorakit.lens._rows import grouped, mean
from lorakit.naming.roles import Role, group_of
from lorakit.spectral import (
    LowRank,
    dominance,
    energy_rank,
    imbalance_ratio,
    principal_angles,
    random_subspace_overlap,
    random_update_cosine,
    subspace_overlap,
    update_cosine,
)

if TYPE_CHECKING:
    from torch import nn

    AdapterLike = str | os.PathLike[str] | nn.Module | Adapter

Verdict = Literal["safe", "redundant", "conflicting", "imbalanced"]
VERDICTS: tuple[Verdict, ...] = ("safe", "redundant", "conflicting", "imbalanced")
Reason = Literal["apart", "aligned", "opposed", "contested", "uneven"]

_SIGNIFICANT = 3.0  # times what chance gives


@dataclass(frozen=True)
class Thresholds:
    """From where on two updates are called what; conventions, not predictions of accuracy. See `judge`."""

    conflicting_below: float = -0.3
    redundant_above: float = 0.5
    contested_above: float = 0.5
    imbalanced_above: float = 5.0

    def __post_init__(self) -> None:
        ranges = {
            "conflicting_below": (-1, 0),
            "redundant_above": (0, 1),
            "contested_above": (0, 1),
            "imbalanced_above": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}; got {value}.")


@dataclass(frozen=True)
class ComparedModule:
    """A module that both adapters have. Where one of its updates is not finite, the numbers and the verdict are None.

    `cosine` is ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖), `random_cosine` its standard deviation for updates of the same spectra
    that are rotated at random, 1 / √(d_out d_in). Principal angles, in radians, ascending, and overlaps (the mean of
    their cos²) are between the column spaces (`output_`) and the row spaces (`input_`) of the `directions_a` and
    `directions_b` leading directions; `random_…_overlap` is max(directions) / d, the mean by chance. `share_a` is
    ‖ΔW_a‖_F / (‖ΔW_a‖_F + ‖ΔW_b‖_F), `sigma_ratio` the larger over the smaller largest singular value, None for
    infinity. `low_rank_part_only`: one of the two has a DoRA magnitude or a SpecLoRA mask, which is not compared.
    """

    module_name: str
    role: Role | None
    layer: int | None
    kind: str
    d_out: int
    d_in: int
    rank_a: int
    rank_b: int
    low_rank_part_only: bool
    verdict: Verdict | None = None
    reason: Reason | None = None
    directions_a: int | None = None
    directions_b: int | None = None
    cosine: float | None = None
    random_cosine: float | None = None
    output_overlap: float | None = None
    input_overlap: float | None = None
    random_output_overlap: float | None = None
    random_input_overlap: float | None = None
    frobenius_norm_a: float | None = None
    frobenius_norm_b: float | None = None
    share_a: float | None = None
    spectral_norm_a: float | None = None
    spectral_norm_b: float | None = None
    sigma_ratio: float | None = None
    output_angles: tuple[float, ...] = ()
    input_angles: tuple[float, ...] = ()

    @property
    def group(self) -> str:
        return group_of(self.module_name)


@dataclass(frozen=True)
class ComparedGroup:
    """Modules of one role, or of one layer, or all; None where none of them is finite.

    `cosine` is that of all the group's updates taken together as one vector, `random_cosine` its standard deviation
    under independent random rotations of each; overlaps are means over modules, without those that have none.
    """

    name: str
    modules: int
    verdicts: dict[Verdict, int]
    cosine: float | None
    random_cosine: float | None
    output_overlap_mean: float | None
    random_output_overlap_mean: float | None
    input_overlap_mean: float | None
    random_input_overlap_mean: float | None
    frobenius_norm_a: float | None
    frobenius_norm_b: float | None
    share_a: float | None


@dataclass(frozen=True)
class ComparisonReport(Report):
    """What `lorakit.lens.compare` found; `only_a` and `only_b` are the modules that the other adapter lacks."""

    path_a: str
    path_b: str
    peft_type_a: str
    peft_type_b: str
    energy: float
    thresholds: Thresholds
    modules: tuple[ComparedModule, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    total: ComparedGroup
    roles: tuple[ComparedGroup, ...]
    layers: tuple[ComparedGroup, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as JSON has them: no NaN, no infinity."""
        summary = {
            "path_a": self.path_a,
            "path_b": self.path_b,
            "peft_type_a": self.peft_type_a,
            "peft_type_b": self.peft_type_b,
            "energy": self.energy,
            "thresholds": asdict(self.thresholds),
            **{key: value for key, value in asdict(self.total).items() if key != "name"},
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "roles": [asdict(group) for group in self.roles],
            "layers": [asdict(group) for group in self.layers],
        }
        return {
            "modules": [asdict(module) for module in self.modules],
            "summary": summary,
            "findings": [asdict(finding) for finding in self.findings],
        }


@torch.no_grad()
def compare(
    a: AdapterLike,
    b: AdapterLike,
    *,
    energy: float = 1.0,
    conflicting_below: float = -0.3,
    redundant_above: float = 0.5,
    contested_above: float = 0.5,
    imbalanced_above: float = 5.0,
    adapter_name_a: str | None = None,
    adapter_name_b: str | None = None,
) -> ComparisonReport:
    """Compare two adapters module by module: directories, files, Hub ids, PeftModels, or open adapters.

    Ranks may differ, and the sets of modules: what only one of them has is listed. One pair of modules is in memory at
    a time. Of DoRA and SPECLORA it is the low-rank part, and labelled so. What does not fit is among the findings.

    Args:
        energy: the directions compared are the fewest that keep this share of ‖ΔW‖_F²; all that are not numerically
            zero at 1.
        conflicting_below, redundant_above, contested_above, imbalanced_above: where the verdicts begin, see `judge`.
        adapter_name_a, adapter_name_b: which adapter of a PeftModel; `a` and `b` may be one model.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read; ValueError for an `energy` outside (0, 1],
        or a threshold that no number reaches.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be a share in (0, 1]; got {energy}.")
    thresholds = Thresholds(conflicting_below, redundant_above, contested_above, imbalanced_above)
    one, other = open_adapter(a, adapter_name=adapter_name_a), open_adapter(b, adapter_name=adapter_name_b)
    findings = [
        replace(finding, message=f"{label}: {finding.message}")
        for label, view in (("A", one), ("B", other))
        for finding in view.findings
    ]
    pairs = _pairs(one, other, findings)
    rows = []
    with tqdm(total=len(pairs), desc="compare", delay=1.0, unit="module", leave=False, disable=None) as progress:
        for mine, yours in pairs:
            rows.append(_row(one, mine, other, yours, energy, thresholds, findings))
            progress.update()
    partial = sum(row.low_rank_part_only for row in rows)
    if partial:
        message = f"Of {partial} modules only the low-rank part is compared: the whole update needs the base weight."
        findings.append(Finding("info", "low_rank_part_only", None, message))
    groups, layers = grouped(rows)
    names_a, names_b = ({module.name for module in view.modules} for view in (one, other))
    return ComparisonReport(
        path_a=one.path,
        path_b=other.path,
        peft_type_a=one.settings.peft_type,
        peft_type_b=other.settings.peft_type,
        energy=energy,
        thresholds=thresholds,
        modules=tuple(rows),
        only_a=tuple(module.name for module in one.modules if module.name not in names_b),
        only_b=tuple(module.name for module in other.modules if module.name not in names_a),
        total=_summarize("all", rows),
        roles=tuple(_summarize(name, group) for name, group in groups.items()),
        layers=tuple(_summarize(name, group) for name, group in layers.items()),
        findings=ordered(findings),
    )


def judge(
    cosine: float, random_cosine: float, shared: float, sigma_ratio: float, thresholds: Thresholds
) -> tuple[Verdict, Reason]:
    """The verdict on two updates and the reason, the first that holds:

    1. conflicting, opposed: the cosine is below `conflicting_below`. Their sum is shorter than either wants.
    2. conflicting, contested: `shared`, the smaller of the overlaps of the two sides above chance, is above
       `contested_above`, and yet the cosine is below −`conflicting_below`. They do different things with the same
       inputs and outputs.
    3. imbalanced, uneven: `sigma_ratio` is above `imbalanced_above`. In an even sum the smaller one is lost.
    4. redundant, aligned: the cosine is above `redundant_above`. Their sum is one of them, too long.
    5. safe, apart.

    A cosine counts for 1 and 4 only from three standard deviations of chance on.
    """
    if abs(cosine) > _SIGNIFICANT * random_cosine and cosine < thresholds.conflicting_below:
        return "conflicting", "opposed"
    if shared > thresholds.contested_above and cosine < -thresholds.conflicting_below:
        return "conflicting", "contested"
    if sigma_ratio > thresholds.imbalanced_above:
        return "imbalanced", "uneven"
    if abs(cosine) > _SIGNIFICANT * random_cosine and cosine > thresholds.redundant_above:
        return "redundant", "aligned"
    return "safe", "apart"


def _pairs(a: Adapter, b: Adapter, findings: list[Finding]) -> list[tuple[AdapterModule, AdapterModule]]:
    """Modules of one name and shape; what has no partner is among the findings."""
    base_a, base_b = a.settings.base_model, b.settings.base_model
    if base_a is not None and base_b is not None and base_a != base_b:
        message = f"A was made for {base_a!r}, B for {base_b!r}: of different models the updates say nothing together."
        findings.append(Finding("warning", "different_base", None, message))
    theirs = {module.name: module for module in b.modules}
    ours = {module.name for module in a.modules}
    for label, lone in (
        ("A", [module.name for module in a.modules if module.name not in theirs]),
        ("B", [module.name for module in b.modules if module.name not in ours]),
    ):
        if lone:
            message = f"{len(lone)} modules are in {label} alone: {preview(lone)}"
            findings.append(Finding("warning", "only_in_one", None, message))
    common = [(module, theirs[module.name]) for module in a.modules if module.name in theirs]
    if not common:
        message = "A and B have no module in common. Are they of the same model, and their names of the same root?"
        findings.append(Finding("error", "nothing_in_common", None, message))
    pairs = []
    for mine, yours in common:
        if (mine.kind, mine.d_out, mine.A.shape[1:]) == (yours.kind, yours.d_out, yours.A.shape[1:]):
            pairs.append((mine, yours))
            continue
        shapes = " and ".join(f"{m.d_out} × {m.d_in} ({m.kind}, A {m.A.shape})" for m in (mine, yours))
        message = f"{mine.name}: the updates have different shapes, {shapes}."
        findings.append(Finding("error", "shape_mismatch", mine.name, message))
    return pairs


def _row(
    a: Adapter,
    mine: AdapterModule,
    b: Adapter,
    yours: AdapterModule,
    energy: float,
    thresholds: Thresholds,
    findings: list[Finding],
) -> ComparedModule:
    row = ComparedModule(
        module_name=mine.name,
        role=mine.role,
        layer=mine.layer,
        kind=mine.kind,
        d_out=mine.d_out,
        d_in=mine.d_in,
        rank_a=mine.rank,
        rank_b=yours.rank,
        low_rank_part_only=any(m.magnitude is not None or m.mask is not None for m in (mine, yours)),
    )
    one, other = a.factors(mine), b.factors(yours)
    for label, update in (("A", one), ("B", other)):
        if not all(bool(half.isfinite().all()) for half in (update.B, update.A)):
            message = f"{mine.name}: {label}'s factors have NaN or infinite entries."
            findings.append(Finding("error", "non_finite", mine.name, message))
            return row
    return _measured(row, one, other.to(device=one.device), energy, thresholds, findings)


def _measured(
    row: ComparedModule,
    one: LowRank,
    other: LowRank,
    energy: float,
    thresholds: Thresholds,
    findings: list[Finding],
) -> ComparedModule:
    a, b = one.svd(), other.svd()
    norms = [float(torch.linalg.vector_norm(S.double())) for S in (a.S, b.S)]
    for label, norm in zip("AB", norms, strict=True):
        if not math.isfinite(norm):
            message = f"{row.module_name}: {label}'s ΔW overflows, though its factors are finite."
            findings.append(Finding("error", "non_finite", row.module_name, message))
            return row
        if norm == 0:
            message = f"{row.module_name}: {label}'s update is zero, as before training."
            findings.append(Finding("warning", "zero_update", row.module_name, message))
    k_a, k_b = _directions(one, a.S, energy), _directions(other, b.S, energy)
    sides: dict[str, Any] = {}
    shared = 0.0
    if k_a and k_b:
        output = a.U[:, :k_a], b.U[:, :k_b]
        into = a.Vh[:k_a].mT, b.Vh[:k_b].mT
        excess = []
        for side, bases, d in (("output", output, row.d_out), ("input", into, row.d_in)):
            overlap, chance = float(subspace_overlap(*bases)), random_subspace_overlap(d, k_a, k_b)
            excess.append((overlap - chance) / (1 - chance) if chance < 1 else 0.0)
            sides |= {f"{side}_overlap": overlap, f"random_{side}_overlap": chance}
            sides[f"{side}_angles"] = tuple(principal_angles(*bases).tolist())
        shared = min(excess)
    cosine = float(update_cosine(one, other))
    random_cosine = random_update_cosine(row.d_out, row.d_in)
    ratio = float(imbalance_ratio(a.S[0], b.S[0]))
    verdict, reason = judge(cosine, random_cosine, shared, ratio, thresholds)
    return replace(
        row,
        verdict=verdict,
        reason=reason,
        directions_a=k_a,
        directions_b=k_b,
        cosine=cosine,
        random_cosine=random_cosine,
        frobenius_norm_a=norms[0],
        frobenius_norm_b=norms[1],
        share_a=float(dominance(torch.tensor(norms, dtype=torch.float64))[0]),
        spectral_norm_a=float(a.S[0]),
        spectral_norm_b=float(b.S[0]),
        sigma_ratio=ratio if math.isfinite(ratio) else None,
        **sides,
    )


def _directions(update: LowRank, S: Tensor, energy: float) -> int:
    rank = int(update.numerical_rank())
    return rank if energy == 1 else min(rank, int(energy_rank(S, energy)))


def _summarize(name: str, rows: Sequence[ComparedModule]) -> ComparedGroup:
    finite = [row for row in rows if row.verdict is not None]
    norm_a, norm_b = (math.hypot(*values) for values in _columns(finite, "frobenius_norm_a", "frobenius_norm_b"))
    cosine = chance = 0.0
    if norm_a and norm_b:
        weights = [
            (x / norm_a) * (y / norm_b)
            for x, y in zip(*_columns(finite, "frobenius_norm_a", "frobenius_norm_b"), strict=True)
        ]
        cosines, chances = _columns(finite, "cosine", "random_cosine")
        cosine = math.fsum(w * c for w, c in zip(weights, cosines, strict=True))
        chance = math.hypot(*(w * c for w, c in zip(weights, chances, strict=True)))
    larger = max(norm_a, norm_b)
    return ComparedGroup(
        name=name,
        modules=len(rows),
        verdicts={verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS},
        cosine=cosine if finite else None,
        random_cosine=chance if finite else None,
        output_overlap_mean=mean(row.output_overlap for row in finite),
        random_output_overlap_mean=mean(row.random_output_overlap for row in finite),
        input_overlap_mean=mean(row.input_overlap for row in finite),
        random_input_overlap_mean=mean(row.random_input_overlap for row in finite),
        frobenius_norm_a=norm_a if finite else None,
        frobenius_norm_b=norm_b if finite else None,
        share_a=(norm_a / larger) / (norm_a / larger + norm_b / larger) if larger else None,
    )


def _columns(rows: Iterable[ComparedModule], *names: str) -> list[list[float]]:
    rows = list(rows)
    return [[getattr(row, name) for row in rows] for name in names]
