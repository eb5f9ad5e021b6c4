"""Whether modules whose pretrained weight has a high effective rank get updates of a high effective rank.

Reference: LoRA-Lens, section 2.1 and Figure 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from lorakit._checks import preview
from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import number
from lorakit._report import Report, ordered
from lorakit.adapters import AdapterModule, open_adapter
from lorakit.adapters.base_weights import ModuleWeights, open_module_weights
from lorakit.errors import Finding
from lorakit.lens._rows import grouped, mean
from lorakit.lens._sources import Source, about_low_rank_part, matrices_of
from lorakit.lens.diagnostics._next_steps import on_disk, short_name
from lorakit.lens.diagnostics.random_adapter import random_adapter
from lorakit.lens.static.spectra import measure
from lorakit.naming.roles import Role, group_of
from lorakit.spectral import effective_rank, pearson

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

_BATCH = 1 << 20  # entries of weights that are decomposed in one batch
_SAME = 1e-6  # a relative spread within the rounding of float32 singular values


@dataclass(frozen=True)
class RankPair:
    """One module: the effective ranks of its pretrained weight, of its ΔW, and of random factors of the same shapes.

    A rank is None if the weight or update is missing or not finite, which a finding says, and 0 if it is zero.
    """

    module_name: str
    role: Role | None
    layer: int | None
    d_out: int
    d_in: int
    rank: int
    low_rank_part_only: bool
    pretrained_effective_rank: float | None
    adapter_effective_rank: float | None
    random_effective_rank: float

    @property
    def group(self) -> str:
        return group_of(self.module_name)

    @property
    def counts(self) -> bool:
        """Whether the module enters the correlation and the means: both ranks are known and not zero."""
        return bool(self.pretrained_effective_rank and self.adapter_effective_rank)


@dataclass(frozen=True)
class CorrelatedGroup:
    """The modules of one role, or all, whose two effective ranks are known and not zero.

    If `pearson` is undefined it is None, and `reason` says why. `random_pearson` is the control: the correlation for an
    adapter with random factors and the same weights, which comes from widths and ranks alone.
    """

    name: str
    modules: int
    pearson: float | None
    random_pearson: float | None
    pretrained_mean: float | None
    adapter_mean: float | None
    random_mean: float | None
    reason: str | None = None

    def __str__(self) -> str:
        if self.pearson is None:
            return f"no correlation: {self.reason}"
        control = "" if self.random_pearson is None else f" (random factors: {self.random_pearson:.2f})"
        return f"Pearson r = {self.pearson:.2f}{control}"


@dataclass(frozen=True, repr=False)
class RankCorrelation(Report):
    """The result of `lorakit.lens.rank_correlation`. `dequantized`: whether base weights were dequantized."""

    path: str
    base: str
    dequantized: bool
    seed: int
    modules: tuple[RankPair, ...]
    total: CorrelatedGroup
    roles: tuple[CorrelatedGroup, ...]
    findings: tuple[Finding, ...]

    @property
    def headline(self) -> str:
        return f"{self.path} on {self.base}: {self.total} over {self.total.modules} modules"

    @property
    def details(self) -> tuple[str, ...]:
        lines = [
            f"{group.name} ({group.modules}): {group}; mean effective rank of weights {number(group.pretrained_mean)}, "
            f"of updates {number(group.adapter_mean)}"
            for group in self.roles
        ]
        return (*lines, *(finding.message for finding in self.findings if finding.severity == "error"))

    @property
    def next_steps(self) -> tuple[str, ...]:
        path = on_disk(self.path)
        return () if path is None else (f"lorakit audit {path} --suggest-ranks",)

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as plain data for JSON, without NaN and infinity."""
        return super().to_dict()

    def plot(self) -> Figure:
        """Effective rank of ΔW against that of the pretrained weight: one point a module, one colour a role.

        Grey crosses are the same modules with random factors: the control.
        """
        figure = new_figure(7, 5)
        axes = figure.subplots()
        counted = [row for row in self.modules if row.counts]
        groups, _ = grouped(counted)
        for name, rows in groups.items():
            x = [row.pretrained_effective_rank or 0.0 for row in rows]
            y = [row.adapter_effective_rank or 0.0 for row in rows]
            axes.plot(x, y, "o", ms=4, alpha=0.7, label=escape_mathtext(name))
        x = [row.pretrained_effective_rank or 0.0 for row in counted]
        axes.plot(x, [row.random_effective_rank for row in counted], "x", ms=4, color="0.6", label="random factors")
        axes.set(xlabel="effective rank of the pretrained weight", ylabel="effective rank of ΔW")
        title = f"{short_name(self.path)}: {self.total.modules} modules"
        axes.set_title(escape_mathtext(title if self.total.pearson is None else f"{title}, {self.total}"), fontsize=10)
        if groups:
            axes.legend(fontsize=8)
        return figure


@torch.no_grad()
def rank_correlation(
    adapter: Source,
    base: str | os.PathLike[str] | nn.Module | None = None,
    *,
    dequantize: bool = False,
    seed: int = 0,
    adapter_name: str | None = None,
    device: torch.device | str | None = None,
) -> RankCorrelation:
    """Correlate the effective ranks of pretrained weights with those of an adapter's updates, over modules.

    All singular values of every adapted weight are computed, in float32. On a CPU that takes minutes for a large model;
    `device` can name an accelerator. Effective ranks also depend on widths, and on ranks if these differ. An adapter
    with random factors of the same shapes shows how much of the correlation comes from that alone. Modules that the
    base lacks, and modules that are zero or not finite on either side, are left out, with a finding. For DoRA and
    SPECLORA the low-rank part of the update is measured.

    Args:
        adapter: a directory, a file, a Hub id, a PeftModel or an open adapter.
        base: the pretrained model: a directory with model.safetensors or its shards, a .safetensors file, or a module,
            with modules named as in the adapter. None for a PeftModel, whose base layers hold the weights.
        dequantize: for models in memory, dequantize weights by PEFT's functions (bitsandbytes, HQQ, torchao). The
            effective rank is then that of the rounded weight.
        seed: of the random factors.
        adapter_name: which adapter of a PeftModel, if not the active one.
        device: where to decompose weights; by default where they are.
    Raises: AdapterFileError, UnsupportedModelError for weights that cannot be read, are quantized, or have an adapter
        merged into them; ValueError for an adapter without its base.

    Example:
        >>> import torch
        >>> from lorakit import lens
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(d, d) for d in (8, 16, 32)))
        >>> config = LoraConfig(r=4, target_modules=["0", "1", "2"], init_lora_weights=False)
        >>> report = lens.rank_correlation(get_peft_model(model, config))
        >>> report.total.modules, -1 <= report.total.pearson <= 1
        (3, True)
    """
    view = matrices_of(open_adapter(adapter, adapter_name=adapter_name))
    if base is None and isinstance(adapter, nn.Module):
        base = adapter
    if base is None:
        known = f", {view.settings.base_model!r}" if view.settings.base_model else ""
        raise ValueError(
            f"`base` must be the adapter's base model{known}: a directory with its safetensors, or the model in "
            "memory. Only a PeftModel brings its own."
        )
    weights = open_module_weights(base, view.modules, dequantize=dequantize)
    findings = list(view.findings)
    rows = measure(view, {}, findings, description="adapter")
    findings += about_low_rank_part(view)
    ours = {row.module_name: row.effective_rank for row in rows}
    drawn = random_adapter(view, torch.Generator("cpu").manual_seed(seed))
    control = {row.module_name: row.effective_rank or 0.0 for row in measure(drawn, {}, [], description="random")}
    theirs = _effective_ranks(view.modules, weights, device, findings)
    pairs = tuple(
        RankPair(
            module_name=row.module_name,
            role=row.role,
            layer=row.layer,
            d_out=row.d_out,
            d_in=row.d_in,
            rank=row.rank,
            low_rank_part_only=row.low_rank_part_only,
            pretrained_effective_rank=theirs.get(row.module_name),
            adapter_effective_rank=ours[row.module_name],
            random_effective_rank=control[row.module_name],
        )
        for row in rows
    )
    findings += _about(pairs)
    counted = [pair for pair in pairs if pair.counts]
    groups, _ = grouped(counted)
    return RankCorrelation(
        path=view.path,
        base=weights.path,
        dequantized=weights.dequantized,
        seed=seed,
        modules=pairs,
        total=_correlated("all", counted),
        roles=tuple(_correlated(name, group) for name, group in groups.items()),
        findings=ordered(findings),
    )


def _about(pairs: Sequence[RankPair]) -> Iterator[Finding]:
    zero = [p.module_name for p in pairs if 0 in (p.pretrained_effective_rank, p.adapter_effective_rank)]
    if zero:
        message = f"{len(zero)} modules with a zero update or weight are left out: {preview(zero)}"
        yield Finding("warning", "left_out", None, message)
    ranks = sorted({pair.rank for pair in pairs if pair.counts})
    if len(ranks) > 1:
        message = f"The modules have ranks from {ranks[0]} to {ranks[-1]}, which affect their effective ranks."
        yield Finding("warning", "mixed_ranks", None, message)


def _correlated(name: str, pairs: Sequence[RankPair]) -> CorrelatedGroup:
    x = [pair.pretrained_effective_rank or 0.0 for pair in pairs]
    y = [pair.adapter_effective_rank or 0.0 for pair in pairs]
    reason = None
    if len(pairs) < 2:
        reason = f"it needs two modules; there {'is one' if pairs else 'are none'}"
    elif _constant(x) or _constant(y):
        reason = f"all {'weights' if _constant(x) else 'updates'} have the same effective rank"
    random = [pair.random_effective_rank for pair in pairs]
    return CorrelatedGroup(
        name=name,
        modules=len(pairs),
        pearson=None if reason else pearson(x, y),
        random_pearson=None if len(pairs) < 2 or _constant(x) or _constant(random) else pearson(x, random),
        pretrained_mean=mean(x),
        adapter_mean=mean(y),
        random_mean=mean(random),
        reason=reason,
    )


def _constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= _SAME * max(values)


def _effective_ranks(
    modules: Sequence[AdapterModule],
    weights: ModuleWeights,
    device: torch.device | str | None,
    findings: list[Finding],
) -> dict[str, float]:
    """Effective ranks of the base weights by module; adds findings for weights that are missing or do not fit."""
    missing = [module.name for module in modules if module.name not in weights.read]
    if missing:
        message = (
            f"{len(missing)} of {len(modules)} adapted modules are not in the base: {preview(missing)}. Its modules "
            "must have the names that the adapter uses; the model in memory that the adapter was made for has them."
        )
        findings.append(Finding("error" if not weights.read else "warning", "base_missing", None, message))
    shapes: dict[tuple[int, int], list[AdapterModule]] = {}
    for module in modules:
        if module.name in weights.read:
            shapes.setdefault((module.d_out, module.d_in), []).append(module)
    found: dict[str, float] = {}
    total = sum(map(len, shapes.values()))
    with tqdm(total=total, desc="weights", delay=1.0, unit="weight", leave=False, disable=None) as progress:
        for (d_out, d_in), group in shapes.items():
            step = max(1, _BATCH // (d_out * d_in))
            for batch in (group[start : start + step] for start in range(0, len(group), step)):
                fitting = {
                    module.name: weight
                    for module in batch
                    if (weight := _matrix(module, weights.read[module.name](), device, findings)) is not None
                }
                if fitting:
                    sigma = torch.linalg.svdvals(torch.stack(list(fitting.values()))).double()
                    found |= zip(fitting, effective_rank(sigma).tolist(), strict=True)
                progress.update(len(batch))
    return found


def _matrix(
    module: AdapterModule, weight: Tensor, device: torch.device | str | None, findings: list[Finding]
) -> Tensor | None:
    """The weight (d_out, d_in), float32, transposed if needed; None, with a finding, if it does not fit."""
    shape = tuple(weight.shape)
    weight = weight.to(device=device, dtype=torch.float32)
    weight = rearrange(weight, "o i ... -> o (i ...)") if weight.ndim > 2 else weight
    if weight.shape != (module.d_out, module.d_in) and weight.ndim == 2:
        weight = weight.mT
    if weight.shape != (module.d_out, module.d_in):
        message = f"{module.name}: the base weight is {shape}, the adapter's update {module.d_out} × {module.d_in}."
        findings.append(Finding("error", "shape_mismatch", module.name, message))
        return None
    if not bool(weight.isfinite().all()):
        message = f"{module.name}: the base weight has NaN or infinite entries."
        findings.append(Finding("error", "non_finite", module.name, message))
        return None
    return weight
