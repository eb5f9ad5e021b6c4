"""What fine-tuning did to the weights of a whole model, by their singular values and vectors.

References: Si et al., "Weight Spectra Induced Efficient Model Adaptation", 2025 (spectra, same-index cosines);
Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024 (intruder dimensions).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import preview
from lorakit._report import Report, ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.adapters.base_weights import BaseWeights, open_base_weights, readable
from lorakit.errors import Finding
from lorakit.lens._rows import grouped, mean
from lorakit.naming.roles import Role, group_of, layer_of, role_of
from lorakit.spectral import effective_rank, energy_rank, residual_ratio, stable_rank

if TYPE_CHECKING:
    from torch import nn

    Model = str | os.PathLike[str] | nn.Module

_RESOLUTION = 16  # spacings of the largest singular value: nearer ones have no vectors of their own


@dataclass(frozen=True)
class ComparedWeight:
    """A weight W (d_out, d_in) that fine-tuning changed to W'. Where one is not finite, the numbers are None.

    `singular_values`, `tuned_singular_values`: of W and W', the leading `rank`. `spectrum_shift`: ‖σ' − σ‖₂ / ‖σ‖₂.
    `output_cosines`, `input_cosines`: between left, and right, singular vectors of W and W' of the same index, in
    [0, 1]. `intruders`: indices, from 0, of left singular vectors of W' that resemble none of W; `input_intruders`: of
    right ones. `update_…`: of ΔW = W' − W. `residual`: ε = ‖ΔW − ΔW_adapter‖_F / ‖ΔW‖_F where an adapter has the
    module; `low_rank_part_only` if only the low-rank part of that could be taken.
    """

    module_name: str
    role: Role | None
    layer: int | None
    d_out: int
    d_in: int
    frobenius_norm: float | None = None
    spectrum_shift: float | None = None
    update_frobenius_norm: float | None = None
    relative_change: float | None = None
    update_spectral_norm: float | None = None
    update_effective_rank: float | None = None
    update_stable_rank: float | None = None
    update_energy_rank: int | None = None
    output_cosine_mean: float | None = None
    input_cosine_mean: float | None = None
    intruders: tuple[int, ...] = ()
    input_intruders: tuple[int, ...] = ()
    residual: float | None = None
    low_rank_part_only: bool = False
    singular_values: tuple[float, ...] = ()
    tuned_singular_values: tuple[float, ...] = ()
    output_cosines: tuple[float, ...] = ()
    input_cosines: tuple[float, ...] = ()

    @property
    def group(self) -> str:
        return group_of(self.module_name)


@dataclass(frozen=True)
class ComparedWeights:
    """Weights of one role, or all: means over those that are finite; None where there are none.

    `relative_change` is √Σ ‖ΔW‖_F² / √Σ ‖W‖_F²; `residual` is √Σ ‖ΔW − ΔW_adapter‖_F² / √Σ ‖ΔW‖_F² over the `adapted`.
    """

    name: str
    weights: int
    relative_change: float | None
    spectrum_shift_mean: float | None
    update_effective_rank_mean: float | None
    output_cosine_mean: float | None
    input_cosine_mean: float | None
    intruders: int
    with_intruders: int
    adapted: int
    residual: float | None


@dataclass(frozen=True)
class WeightsReport(Report):
    """What `lorakit.lens.compare_weights` found; `unchanged` weights are equal entry by entry."""

    base: str
    fine_tuned: str
    adapter: str | None
    rank: int | None
    top_k: int
    intruder_below: float
    energy: float
    modules: tuple[ComparedWeight, ...]
    unchanged: tuple[str, ...]
    only_base: tuple[str, ...]
    only_fine_tuned: tuple[str, ...]
    total: ComparedWeights
    roles: tuple[ComparedWeights, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`modules`, `summary` and `findings` as JSON has them: no NaN, no infinity."""
        options = ("base", "fine_tuned", "adapter", "rank", "top_k", "intruder_below", "energy")
        summary = {
            **{name: getattr(self, name) for name in options},
            **{key: value for key, value in asdict(self.total).items() if key != "name"},
            **{name: list(getattr(self, name)) for name in ("unchanged", "only_base", "only_fine_tuned")},
            "roles": [asdict(group) for group in self.roles],
        }
        return {
            "modules": [asdict(module) for module in self.modules],
            "summary": summary,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class _Options:
    rank: int | None
    top_k: int
    intruder_below: float
    energy: float


@torch.no_grad()
def compare_weights(
    base: Model,
    fine_tuned: Model,
    *,
    adapter: Model | Adapter | None = None,
    modules: str | Sequence[str] | None = None,
    rank: int | None = 64,
    top_k: int = 10,
    intruder_below: float = 0.5,
    energy: float = 0.9,
    adapter_name: str | None = None,
    device: torch.device | str | None = None,
) -> WeightsReport:
    """Compare the matrices of a model before and after fine-tuning, and the change with an adapter's, if given.

    Models are directories of safetensors, also in shards, single .safetensors files, or modules in memory; names must
    be the same in both. One weight is in memory at a time. Each takes three full SVDs, in float32 (float64 for
    float64 weights): minutes for a large model on a CPU; `modules` and `device` are there for that.

    An intruder is one of the `top_k` leading singular vectors of W' whose |cos| with every singular vector of W is
    below `intruder_below`, those of singular value 0 left aside in both. Signs of singular vectors do not matter, as
    |cos| is taken. Vectors of singular values nearer than the arithmetic tells apart (16 spacings of the largest) are
    known only as a subspace: there the cosine is that with the subspace, and of the same index the root mean square
    over it.

    Args:
        modules: a regular expression for whole module names, or names as in PEFT's `target_modules`; all matrices
            unless given.
        rank: how many of the leading singular values and same-index cosines to keep and average; None for all.
        energy: the share of ‖ΔW‖_F² that `update_energy_rank` keeps.
        adapter_name: which adapter of a PeftModel, if not the active one.
        device: where to compute; where the weights are unless given.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read, or has adapters attached; ValueError for
        options out of range.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, or None; got {rank}.")
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1; got {top_k}.")
    for name, share in (("intruder_below", intruder_below), ("energy", energy)):
        if not 0 < share <= 1:
            raise ValueError(f"`{name}` must be in (0, 1]; got {share}.")
    options = _Options(rank, top_k, intruder_below, energy)
    before, after = open_base_weights(base), open_base_weights(fine_tuned)
    view = None if adapter is None else open_adapter(adapter, adapter_name=adapter_name)
    findings = [] if view is None else list(view.findings)
    names, only_base, only_tuned = _common(before, after, modules, findings)
    adapted = {} if view is None else {module.name: module for module in view.modules}
    rows, unchanged = [], []
    with tqdm(total=len(names), desc="weights", delay=1.0, unit="weight", leave=False, disable=None) as progress:
        for key in names:
            W, tuned = (checkpoint.read(key).to(device=device) for checkpoint in (before, after))
            tuned = tuned.to(device=W.device)
            if torch.equal(W, tuned):
                unchanged.append(_module_of(key))
            else:
                rows.append(_row(key, W, tuned, view, adapted.get(_module_of(key)), options, findings))
            progress.update()
    _about_adapter(adapted, rows, unchanged, findings)
    groups, _ = grouped(rows)
    return WeightsReport(
        base=before.path,
        fine_tuned=after.path,
        adapter=None if view is None else view.path,
        **asdict(options),
        modules=tuple(rows),
        unchanged=tuple(unchanged),
        only_base=only_base,
        only_fine_tuned=only_tuned,
        total=_summarize("all", rows),
        roles=tuple(_summarize(name, group) for name, group in groups.items()),
        findings=ordered(findings),
    )


def _module_of(key: str) -> str:
    return key.removesuffix(".weight")


def _common(
    before: BaseWeights, after: BaseWeights, modules: str | Sequence[str] | None, findings: list[Finding]
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Names of matrices that both have in one shape; of those that one has alone."""
    chosen = [
        {key: info for key, info in checkpoint.infos.items() if len(info.shape) == 2 and _is_meant(key, modules)}
        for checkpoint in (before, after)
    ]
    first, second = chosen
    only_first = tuple(_module_of(key) for key in first if key not in second)
    only_second = tuple(_module_of(key) for key in second if key not in first)
    for label, lone in (("the base", only_first), ("the fine-tuned model", only_second)):
        if lone:
            message = f"{len(lone)} matrices are in {label} alone: {preview(lone)}"
            findings.append(Finding("warning", "only_in_one", None, message))
    names = []
    for key in (key for key in first if key in second):
        name = _module_of(key)
        if first[key].shape != second[key].shape:
            message = f"{name}: the shapes differ, {first[key].shape} and {second[key].shape}."
            findings.append(Finding("error", "shape_mismatch", name, message))
        elif not (readable(first[key]) and readable(second[key])):
            dtypes = f"{first[key].dtype} and {second[key].dtype}"
            message = f"{name}: {dtypes} cannot be compared; float16, bfloat16, 32 and 64 can."
            findings.append(Finding("error", "unsupported_dtype", name, message))
        elif 0 not in first[key].shape:
            names.append(key)
    if not any(key in second for key in first):
        message = "The models have no matrix in common" + ("." if modules is None else " that `modules` matches.")
        findings.append(Finding("error", "nothing_in_common", None, message))
    return names, only_first, only_second


def _is_meant(key: str, modules: str | Sequence[str] | None) -> bool:
    if modules is None:
        return True
    name = _module_of(key)
    if isinstance(modules, str):
        try:
            return re.fullmatch(modules, name) is not None
        except re.error as error:
            raise ValueError(f"`modules` must be a regular expression, or a list of names: {error}.") from None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _row(
    key: str,
    W: Tensor,
    tuned: Tensor,
    view: Adapter | None,
    module: AdapterModule | None,
    options: _Options,
    findings: list[Finding],
) -> ComparedWeight:
    name = _module_of(key)
    row = ComparedWeight(name, role_of(name), layer_of(name), *W.shape)
    dtype = torch.promote_types(torch.promote_types(W.dtype, tuned.dtype), torch.float32)
    W, tuned = W.to(dtype), tuned.to(dtype)
    for label, weight in (("base", W), ("fine-tuned", tuned)):
        if not bool(weight.isfinite().all()):
            message = f"{name}: the {label} weight has NaN or infinite entries."
            findings.append(Finding("error", "non_finite", name, message))
            return row
    update = tuned - W
    row = replace(row, **_of_vectors(W, tuned, options), **_of_update(update, W, options))
    if view is None or module is None:
        return row
    shape = (module.d_out, module.d_in)
    # a config has one fan_in_fan_out for all modules, right or not: where the shape decides, it does
    if update.shape == shape[::-1] and (update.shape != shape or module.kind == "embedding" or module.fan_in_fan_out):
        update = update.mT
    if update.shape != shape:
        message = f"{name}: the adapter's update is {module.d_out} × {module.d_in}, the weight's {tuple(update.shape)}."
        findings.append(Finding("error", "shape_mismatch", name, message))
        return row
    residual = float(residual_ratio(update, view.factors(module).to(device=update.device)))
    if not math.isfinite(residual):
        findings.append(Finding("error", "non_finite", name, f"{name}: the adapter's update is not finite."))
        return row
    return replace(row, residual=residual, low_rank_part_only=module.magnitude is not None or module.mask is not None)


def _of_update(update: Tensor, W: Tensor, options: _Options) -> dict[str, Any]:
    sigma = torch.linalg.svdvals(update)
    norm, size = _norm(sigma), _norm(W)
    return {
        "frobenius_norm": size,
        "update_frobenius_norm": norm,
        "relative_change": norm / size if size else None,
        "update_spectral_norm": float(sigma[0]),
        "update_effective_rank": float(effective_rank(sigma)),
        "update_stable_rank": float(stable_rank(sigma)),
        "update_energy_rank": int(energy_rank(sigma, options.energy)),
    }


def _of_vectors(W: Tensor, tuned: Tensor, options: _Options) -> dict[str, Any]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U_tuned, S_tuned, Vh_tuned = torch.linalg.svd(tuned, full_matrices=False)
    kept = slice(options.rank)
    of_base = _subspaces(_merged(S))
    of_both = _subspaces(_merged(S) | _merged(S_tuned))
    # one more than the last subspace: the directions of singular value 0, which W does not have
    real = torch.where(_unresolved(S) < S, of_base, int(of_base[-1]) + 1)
    looked_at = min(options.top_k, int((_unresolved(S_tuned) < S_tuned).sum()))
    found: dict[str, Any] = {}
    for side, first, second in (("output", U.mT, U_tuned), ("input", Vh, Vh_tuned.mT)):
        squares = (first @ second).square()
        cosines = _same_index(squares, of_both)[kept]
        nearest = _onto(squares[:, :looked_at], real)[: int(of_base[-1]) + 1].amax(0).sqrt()
        intruders = (nearest < options.intruder_below).nonzero()[:, 0].tolist()
        found[f"{side}_cosines"] = tuple(cosines.tolist())
        found[f"{side}_cosine_mean"] = float(cosines.mean())
        found["intruders" if side == "output" else "input_intruders"] = tuple(intruders)
    size = _norm(S)
    return found | {
        "spectrum_shift": _norm(S_tuned - S) / size if size else None,
        "singular_values": tuple(S[kept].tolist()),
        "tuned_singular_values": tuple(S_tuned[kept].tolist()),
    }


def _unresolved(S: Tensor) -> Tensor:
    """The distance below which two singular values are one to the arithmetic."""
    return _RESOLUTION * torch.finfo(S.dtype).eps * S[0]


def _merged(S: Tensor) -> Tensor:
    """Whether each singular value but the first is one with that before it."""
    return S[:-1] - S[1:] <= _unresolved(S)


def _subspaces(merged: Tensor) -> Tensor:
    """For each index the number of its subspace."""
    return torch.nn.functional.pad((~merged).long().cumsum(0), (1, 0))


def _onto(squares: Tensor, subspaces: Tensor) -> Tensor:
    """Squared norms of projections: of each column's vector, on each subspace that the rows make up."""
    return squares.new_zeros(int(subspaces.max()) + 1, squares.shape[1]).index_add(0, subspaces, squares)


def _same_index(squares: Tensor, subspaces: Tensor) -> Tensor:
    own = _onto(squares, subspaces).gather(0, subspaces[None])[0]
    sums = own.new_zeros(int(subspaces[-1]) + 1).index_add(0, subspaces, own)
    counts = own.new_zeros(int(subspaces[-1]) + 1).index_add(0, subspaces, torch.ones_like(own))
    return (sums / counts)[subspaces].sqrt().clamp(0.0, 1.0)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _about_adapter(
    adapted: dict[str, AdapterModule],
    rows: Iterable[ComparedWeight],
    unchanged: Iterable[str],
    findings: list[Finding],
) -> None:
    same = [name for name in unchanged if name in adapted]
    missing = [name for name in adapted if name not in {row.module_name for row in rows} | set(unchanged)]
    for code, names, what in (
        ("adapted_unchanged", same, "are unchanged in the fine-tuned model, though the adapter updates them"),
        ("adapted_missing", missing, "of the adapter are not among the weights compared"),
    ):
        if names:
            message = f"{len(names)} modules {what}: {preview(names)}"
            findings.append(Finding("warning", code, None, message))


def _summarize(name: str, rows: Sequence[ComparedWeight]) -> ComparedWeights:
    finite = [row for row in rows if row.update_frobenius_norm is not None]
    size = math.hypot(*(row.frobenius_norm or 0.0 for row in finite))
    change = math.hypot(*(row.update_frobenius_norm or 0.0 for row in finite))
    adapted = [row for row in finite if row.residual is not None]
    target = math.hypot(*(row.update_frobenius_norm or 0.0 for row in adapted))
    missed = math.hypot(*((row.residual or 0.0) * (row.update_frobenius_norm or 0.0) for row in adapted))
    return ComparedWeights(
        name=name,
        weights=len(rows),
        relative_change=change / size if size else None,
        spectrum_shift_mean=mean(row.spectrum_shift for row in finite),
        update_effective_rank_mean=mean(row.update_effective_rank for row in finite),
        output_cosine_mean=mean(row.output_cosine_mean for row in finite),
        input_cosine_mean=mean(row.input_cosine_mean for row in finite),
        intruders=sum(len(row.intruders) for row in finite),
        with_intruders=sum(bool(row.intruders) for row in finite),
        adapted=len(adapted),
        residual=missed / target if target else None,
    )
