"""Compare two adapters: which directions their updates share, whether they agree, and whether to merge them.

All numbers describe ΔW, not the factors: B → B R, A → R⁻¹ A changes nothing.
References: Björck & Golub 1973 (principal angles); Gradience (overlap, conflict, dominance).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import check_number, preview
from lorakit._report import ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.adapters.experts import expert_name
from lorakit.adapters.whole import with_whole_updates
from lorakit.errors import AdapterFileError, Finding, UnsupportedModelError
from lorakit.lens._rows import grouped
from lorakit.lens.static.compared_experts import groups as groups_of
from lorakit.lens.static.comparison_report import ComparedGroup, ComparedModule, ComparisonReport, summarize
from lorakit.lens.static.forecast import ForecastOptions, forecast
from lorakit.lens.static.forecast_report import MergeForecast
from lorakit.lens.static.stacks import merged_findings
from lorakit.lens.static.verdicts import Reason, Thresholds, Verdict, judge
from lorakit.merging._combine import Method
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
    weights: Sequence[float] | None = None,
    methods: Sequence[Method] = ("linear", "svd"),
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    by: Literal["group", "expert"] = "group",
    base: str | os.PathLike[str] | nn.Module | None = None,
    adapter_name_a: str | None = None,
    adapter_name_b: str | None = None,
) -> ComparisonReport:
    """Compare two adapters module by module, with a verdict on each pair of updates and what chance would give.

    Ranks may differ. Modules that only one adapter has are listed, and mismatches are findings. One pair of modules is
    in memory at a time. For DoRA and SPECLORA without `base` the low-rank parts are compared, and the report says so. A
    verdict is the first of these that applies:

    * conflicting (opposed): the cosine of the updates is below `conflicting_below`;
    * conflicting (contested): the updates share inputs and outputs, both overlaps above chance exceeding
      `contested_above`, but map the one to the other differently;
    * imbalanced: one spectral norm is more than `imbalanced_above` times the other;
    * redundant: the cosine is above `redundant_above`;
    * safe.

    The overall verdict is by the same rules, on the updates of all modules as one vector each, mean overlaps, and for
    imbalance the Frobenius norms times `weights`. Then what is left of each adapter in their merge, by each of
    `methods`; see `lorakit.lens.MethodForecast` for the formulas. It is computed as `lorakit.merging.merge` merges:
    "linear" and "svd" from the factors; "ties" and "dare" form every ΔW, so they are forecast only if asked for, and
    take as long as their merge. Nothing is forecast for adapters that cannot be merged; the report says why.

    Args:
        a, b: directories, .safetensors or .bin files, Hub ids, PeftModels, or open adapters.
        energy: compare the fewest directions that keep this share of ‖ΔW‖_F²; at 1, all that are not numerically zero.
        conflicting_below, redundant_above, contested_above, imbalanced_above: thresholds of the verdicts.
        weights: the weights of the merge, as for `lorakit.merging.merge`; None is 1/2 each.
        methods: whose merges to forecast, of "linear", "svd", "ties" and "dare".
        rank, density, seed: of those merges; `rank` is of all methods but "linear", None as in `merge`.
        by: "expert" gives every expert a row; otherwise the experts of one parameter, or of one name and layer, are
            one row, with the verdict of most of them.
        base: the base model's weights (a directory or file of safetensors, or the model): DoRA and SPECLORA are then
            compared by their whole updates.
        adapter_name_a, adapter_name_b: which adapter of a PeftModel; `a` and `b` may be the same model.
    Raises: AdapterFileError, UnsupportedModelError for an adapter that cannot be read; ValueError for an `energy`
        outside (0, 1], a threshold outside its range, an unknown `by` or method, and weights that are not two finite
        numbers.

    Example:
        >>> import lorakit, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
        >>> _ = torch.nn.init.eye_(model.base_model.model[0].lora_B["default"].weight)
        >>> report = lorakit.lens.compare(model, model)
        >>> report.modules[0].verdict, round(report.modules[0].cosine, 4)
        ('redundant', 1.0)
        >>> report.forecast.recommended.method, round(report.forecast.recommended.strength_a, 4)
        ('linear', 1.0)
    """
    check_number("energy", energy, above=0, most=1)
    if by not in ("group", "expert"):
        raise ValueError(f"`by` must be 'group' or 'expert'; got {by!r}.")
    thresholds = Thresholds(conflicting_below, redundant_above, contested_above, imbalanced_above)
    options = ForecastOptions(weights, methods, rank, density, seed)
    stored = open_adapter(a, adapter_name=adapter_name_a), open_adapter(b, adapter_name=adapter_name_b)
    one, other = (with_whole_updates(view, base) for view in stored)
    findings = [
        replace(finding, message=f"{label}: {finding.message}")
        for label, view in (("A", one), ("B", other))
        for finding in view.findings
    ]
    rows = _compared(one, other, energy, thresholds, by, findings)
    groups, layers = grouped(rows)
    total = summarize("all", rows)
    expected, no_forecast = _forecast((one, other), options, energy, findings)
    verdict, reason = _overall(total, options.chosen, thresholds)
    names_a, names_b = ({module.name for module in view.modules} for view in (one, other))
    return ComparisonReport(
        path_a=one.path,
        path_b=other.path,
        peft_type_a=stored[0].settings.peft_type,
        peft_type_b=stored[1].settings.peft_type,
        base=os.fspath(base) if isinstance(base, str | os.PathLike) else None,
        energy=energy,
        thresholds=thresholds,
        modules=tuple(rows),
        only_a=tuple(module.name for module in one.modules if module.name not in names_b),
        only_b=tuple(module.name for module in other.modules if module.name not in names_a),
        verdict=verdict,
        reason=reason,
        forecast=expected,
        no_forecast=no_forecast,
        total=total,
        roles=tuple(summarize(name, group) for name, group in groups.items()),
        layers=tuple(summarize(name, group) for name, group in layers.items()),
        findings=ordered(findings),
    )


def _compared(
    one: Adapter, other: Adapter, energy: float, thresholds: Thresholds, by: str, findings: list[Finding]
) -> Sequence[ComparedModule]:
    """The rows of all pairs of modules; adds to the findings."""
    pairs = _pairs(one, other, findings)
    compared: list[ComparedModule] = []
    found: list[Finding] = []
    progress = tqdm(pairs, desc="compare", delay=1.0, unit="module", leave=False, disable=None)
    with one.source.reader() as read_one, other.source.reader() as read_other:
        for mine, yours in progress:
            updates = mine.update(read_one), yours.update(read_other)
            compared += _rows(mine, yours, updates, energy, thresholds, found)
    findings += merged_findings(found, [mine for mine, _ in pairs])
    rows = compared if by == "expert" else groups_of(compared)
    partial = sum(row.low_rank_part_only for row in rows)
    if partial:
        message = (
            f"In {partial} modules only the low-rank part is compared; for the whole update, give the base weights "
            f"(`base`, --base)."
        )
        findings.append(Finding("info", "low_rank_part_only", None, message))
    return rows


def _forecast(
    views: tuple[Adapter, Adapter], options: ForecastOptions, energy: float, findings: Sequence[Finding]
) -> tuple[MergeForecast | None, str | None]:
    """The forecast of the merge, or why there is none."""
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        return None, errors[0]
    try:
        return forecast(views, options, energy), None
    except (UnsupportedModelError, AdapterFileError, ValueError) as error:
        return None, str(error)


def _overall(
    total: ComparedGroup, weights: tuple[float, float], thresholds: Thresholds
) -> tuple[Verdict, Reason] | tuple[None, None]:
    """The verdict on all modules together, merged with these weights; None without a finite module."""
    if total.cosine is None or total.random_cosine is None:
        return None, None
    excess = [
        (overlap - chance) / (1 - chance)
        for overlap, chance in (
            (total.output_overlap_mean, total.random_output_overlap_mean),
            (total.input_overlap_mean, total.random_input_overlap_mean),
        )
        if overlap is not None and chance is not None and chance < 1
    ]
    sign = math.copysign(1, weights[0]) * math.copysign(1, weights[1])
    norms = [
        abs(w) * (n or 0.0) for w, n in zip(weights, (total.frobenius_norm_a, total.frobenius_norm_b), strict=True)
    ]
    ratio = 1.0 if norms[0] == norms[1] else math.inf if min(norms) == 0 else max(norms) / min(norms)
    shared = min(excess) if len(excess) == 2 else 0.0
    return judge(sign * total.cosine, total.random_cosine, shared, ratio, thresholds)


def _pairs(a: Adapter, b: Adapter, findings: list[Finding]) -> list[tuple[AdapterModule, AdapterModule]]:
    """Modules with equal names and shapes; findings for all others."""
    base_a, base_b = a.settings.base_model, b.settings.base_model
    if base_a is not None and base_b is not None and base_a != base_b:
        message = f"A was made for {base_a!r}, B for {base_b!r}: updates of different base models cannot be compared."
        findings.append(Finding("warning", "different_base", None, message))
    theirs = {module.name: module for module in b.modules}
    ours = {module.name for module in a.modules}
    for label, lone in (
        ("A", [module.name for module in a.modules if module.name not in theirs]),
        ("B", [module.name for module in b.modules if module.name not in ours]),
    ):
        if lone:
            message = f"{len(lone)} modules are only in {label}: {preview(lone)}"
            findings.append(Finding("warning", "only_in_one", None, message))
    common = [(module, theirs[module.name]) for module in a.modules if module.name in theirs]
    if not common:
        message = "A and B have no module in common. Were they made for the same model, wrapped in the same way?"
        findings.append(Finding("error", "nothing_in_common", None, message))
    pairs = []
    for mine, yours in common:
        if _shape(mine) == _shape(yours):
            pairs.append((mine, yours))
            continue
        shapes = " and ".join(f"{m.d_out} × {m.d_in} ({m.kind}, A {m.A.shape})" for m in (mine, yours))
        message = f"{mine.name}: the updates have different shapes: {shapes}."
        findings.append(Finding("error", "shape_mismatch", mine.name, message))
    return pairs


def _shape(module: AdapterModule) -> tuple[object, ...]:
    return module.kind, module.d_out, module.A.shape[1:], module.experts


def _rows(
    mine: AdapterModule,
    yours: AdapterModule,
    updates: tuple[LowRank, LowRank],
    energy: float,
    thresholds: Thresholds,
    findings: list[Finding],
) -> Iterator[ComparedModule]:
    """The row of one pair, or of each expert; without numbers, and with a finding, if an update is not finite."""
    row = ComparedModule(
        module_name=mine.name,
        role=mine.role,
        layer=mine.layer,
        kind=mine.kind,
        d_out=mine.d_out,
        d_in=mine.d_in,
        rank_a=mine.rank,
        rank_b=yours.rank,
        whole_update=any(m.whole_of is not None for m in (mine, yours)),
        low_rank_part_only=any(m.magnitude is not None or m.mask is not None for m in (mine, yours)),
    )
    one, other = updates
    if mine.experts is None:
        yield _measured(row, one, other.to(device=one.device), energy, thresholds, findings)
    for expert in range(mine.experts or 0):
        pair = [LowRank(update.B[expert], update.A[expert], update.scaling) for update in updates]
        own = replace(row, module_name=expert_name(mine.name, expert), stack=mine.name)
        yield _measured(own, pair[0], pair[1].to(device=one.device), energy, thresholds, findings)


def _measured(
    row: ComparedModule,
    one: LowRank,
    other: LowRank,
    energy: float,
    thresholds: Thresholds,
    findings: list[Finding],
) -> ComparedModule:
    for label, update in (("A", one), ("B", other)):
        if not all(bool(half.isfinite().all()) for half in (update.B, update.A)):
            message = f"{row.module_name}: {label}'s factors have NaN or infinite entries."
            findings.append(Finding("error", "non_finite", row.module_name, message))
            return row
    a, b = one.svd(), other.svd()
    norms = [float(torch.linalg.vector_norm(S.double())) for S in (a.S, b.S)]
    for label, norm in zip("AB", norms, strict=True):
        if not math.isfinite(norm):
            message = f"{row.module_name}: {label}'s ΔW overflows, although its factors are finite."
            findings.append(Finding("error", "non_finite", row.module_name, message))
            return row
        if norm == 0:
            message = f"{row.module_name}: {label}'s update is zero, as before training."
            findings.append(Finding("warning", "zero_update", row.module_name, message))
    k_a, k_b = _directions(one, a.S, energy), _directions(other, b.S, energy)
    sides, shared = _subspaces(row, (a.U[:, :k_a], b.U[:, :k_b]), (a.Vh[:k_a].mT, b.Vh[:k_b].mT))
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


def _subspaces(
    row: ComparedModule, outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor]
) -> tuple[dict[str, Any], float]:
    """Overlaps and angles on both sides, and the smaller overlap above chance; none and 0 if an update is zero."""
    k_a, k_b = (basis.shape[-1] for basis in outputs)
    if not (k_a and k_b):
        return {}, 0.0
    sides: dict[str, Any] = {}
    excess = []
    for side, bases, d in (("output", outputs, row.d_out), ("input", inputs, row.d_in)):
        overlap, chance = float(subspace_overlap(*bases)), random_subspace_overlap(d, k_a, k_b)
        excess.append((overlap - chance) / (1 - chance) if chance < 1 else 0.0)
        sides |= {f"{side}_overlap": overlap, f"random_{side}_overlap": chance}
        sides[f"{side}_angles"] = tuple(principal_angles(*bases).tolist())
    return sides, min(excess)


def _directions(update: LowRank, S: Tensor, energy: float) -> int:
    """The number of leading directions that keep the energy and are not numerically zero."""
    rank = int(update.numerical_rank())
    return rank if energy == 1 else min(rank, int(energy_rank(S, energy)))
