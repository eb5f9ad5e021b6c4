"""Several adapters as one plain LoRA.

`linear` and `svd` stay in factor space: Σ wᵢ ΔWᵢ has the factors [w₁s₁B₁ … wₙsₙBₙ] and [A₁; …; Aₙ]. `ties` and `dare`
are defined entry by entry of ΔW, so each module's ΔWs are formed, one module at a time.

References: Yadav et al., "TIES-Merging", NeurIPS 2023; Yu et al., "Language Models are Super Mario" (DARE), ICML 2024.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit.adapters import Adapter, AdapterModule, open_saved_adapter
from lorakit.adapters.write_lora import (
    WrittenReport,
    carried_tensors,
    check_finite,
    check_rewritable,
    factor_tensors,
    plain_config,
    write_plain,
)
from lorakit.errors import Finding, UnsupportedModelError
from lorakit.naming.roles import Role
from lorakit.spectral import LowRank, energy_rank
from lorakit.spectral.dense import factored, leading

if TYPE_CHECKING:
    from torch import nn

Method = Literal["linear", "svd", "ties", "dare"]
METHODS = ("linear", "svd", "ties", "dare")
_DENSE = ("ties", "dare")
# Fields of the configs on which adapters must agree, for one config to say what all of them mean.
_AGREE = ("bias", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")


@dataclass(frozen=True)
class MergedModule:
    """One module of a merge. `sources` is how many of the adapters adapt it.

    `rank` is that of the merge before it is cut to `kept_rank`, and `energy_kept` the share of the merge's ‖ΔW‖_F²
    that this keeps (1 where ΔW = 0). `error` is ‖written − meant‖_F / ‖meant‖_F; None where nothing was verified.
    """

    module_name: str
    role: Role | None
    layer: int | None
    sources: int
    rank: int
    kept_rank: int
    parameters: int
    energy_kept: float
    error: float | None


@dataclass(frozen=True)
class MergeReport(WrittenReport):
    """What `merge` wrote; `energy_kept` is of all modules, Σ ‖ΔW‖_F²."""

    path: str
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    density: float | None
    seed: int | None
    r: int
    lora_alpha: float
    parameters: int
    energy_kept: float
    verified: bool
    modules: tuple[MergedModule, ...]
    findings: tuple[Finding, ...]


def merge(
    adapters: Sequence[str | os.PathLike[str] | nn.Module | Adapter],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    verify: bool = True,
) -> MergeReport:
    """Merge adapters of one base model, and write the merge as a plain LoRA that PEFT loads.

    * ``linear``: Σ wᵢ ΔWᵢ, exact with the sum of the ranks, or cut to `rank` or `energy`. (PEFT's "cat"; its "linear"
      interpolates factors, which is not the sum of the updates.)
    * ``svd``: the same sum, cut to `rank`, by default the largest of the adapters' ranks in each module.
    * ``ties``: of each module's ΔWᵢ the `density` largest entries are kept; per entry the sign with the larger total
      wins, and the wᵢ-weighted values that have it are averaged. Then the best cut to `rank`, by default as in ``svd``.
    * ``dare``: entries are kept at random with probability `density` and divided by it, then summed with weights; then
      cut as in ``ties``.

    ``linear`` and ``svd`` never form ΔW. ``ties`` and ``dare`` do, one module at a time, with PEFT's own functions, and
    need an eigendecomposition of min(d_out, d_in)² entries a module: minutes to hours on large models.
    Adapters may have different ranks, scalings, and partly different modules: a module that one lacks is 0 there.
    Tensors beside the updates (modules_to_save and the like) are carried over from those that have them, if they agree.

    Args:
        weights: one for each adapter, not normalised; None is 1/n each.
        rank, energy: one at most; `energy` keeps that share of each module's ‖ΔW‖_F² in the smallest rank that does.
        density: for ``ties`` and ``dare``, in (0, 1].
        seed: of ``dare``'s choice.
    Raises: ValueError for weights, ranks and densities that make no sense, shapes that differ and tensors beside the
        updates that disagree; TypeError for options that the method has no use for; UnsupportedModelError for DoRA,
        `lora_bias`, SPECLORA and what else a sum of updates is not one adapter of; AdapterFileError; OSError.
        `out` is then as it was.
    """
    weights = _check(adapters, weights, method, rank, energy, density)
    views = [open_saved_adapter(adapter) for adapter in adapters]
    for view in views:
        check_rewritable(view)
    present = _modules(views)
    tensors, findings = _beside(views)
    findings += _about(views, present)
    combine = _combiner(method, density)
    updates: dict[str, LowRank] = {}
    rows: list[MergedModule] = []
    kept_energy = total_energy = 0.0
    progress = tqdm(total=len(present), desc="merging", delay=1.0, unit="module", leave=False, disable=None)
    with torch.no_grad(), progress, torch.random.fork_rng(enabled=method == "dare"):
        torch.manual_seed(seed) if method == "dare" else None
        for name, modules in present.items():
            items = []
            for i, module in modules.items():
                update = views[i].factors(module)
                check_finite(views[i], module, update)
                items.append((update, weights[i]))
            merged = _merged(items, combine, method, rank, energy)
            like = _like(list(modules.values()))
            updates[name] = merged.update
            tensors |= factor_tensors(like, merged.update)
            kept_energy, total_energy = kept_energy + merged.kept, total_energy + merged.total
            rows.append(
                MergedModule(
                    module_name=name,
                    role=like.role,
                    layer=like.layer,
                    sources=len(modules),
                    rank=merged.rank,
                    kept_rank=merged.update.rank,
                    parameters=merged.update.rank * (like.d_out + like.d_in),
                    energy_kept=merged.kept / merged.total if merged.total > 0 else 1.0,
                    error=None,
                )
            )
            progress.update()
    config = _config(views, present, {name: update.rank for name, update in updates.items()})
    errors = write_plain(out, tensors, config, updates, verify=verify)
    return MergeReport(
        path=os.fspath(out),
        sources=tuple(view.path for view in views),
        weights=tuple(weights),
        method=method,
        density=density,
        seed=seed if method == "dare" else None,
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        parameters=sum(row.parameters for row in rows),
        energy_kept=kept_energy / total_energy if total_energy > 0 else 1.0,
        verified=verify,
        modules=tuple(replace(row, error=errors.get(row.module_name)) for row in rows),
        findings=tuple(findings),
    )


def _check(
    adapters: object,
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
) -> list[float]:
    """The weights, if all options make sense."""
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence):
        raise TypeError(f"`adapters` must be a list of adapters; got {type(adapters).__name__}.")
    if not adapters:
        raise ValueError("`adapters` must have at least one adapter; got none.")
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    if rank is not None and energy is not None:
        raise TypeError("Give `rank` or `energy`, not both.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be a positive integer; got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` must be a share in (0, 1]; got {energy!r}.")
    if method in _DENSE and density is None:
        raise TypeError(f"`density` must be given for {method!r}: the share of entries that is kept.")
    if method not in _DENSE and density is not None:
        raise TypeError(f"`density` is for {' and '.join(_DENSE)}; {method!r} keeps all entries.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1]; got {density!r}.")
    chosen = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(chosen) != len(adapters):
        raise ValueError(f"`weights` must have one weight for each of {len(adapters)} adapters; got {len(chosen)}.")
    if not all(math.isfinite(weight) for weight in chosen):
        raise ValueError(f"`weights` must be finite; got {chosen}.")
    return chosen


def _modules(views: Sequence[Adapter]) -> dict[str, dict[int, AdapterModule]]:
    """By name, the modules of the adapters that have it, by the adapter's place.

    Raises: ValueError where they differ in shape; UnsupportedModelError where something beside an update cannot be
    summed.
    """
    found: dict[str, dict[int, AdapterModule]] = {}
    for i, view in enumerate(views):
        for module in view.modules:
            if module.magnitude is not None or module.bias is not None:
                what = "a DoRA magnitude" if module.magnitude is not None else "a `lora_bias`"
                raise UnsupportedModelError(f"{view.path}: {module.name} has {what}, which no sum of updates keeps.")
            found.setdefault(module.name, {})[i] = module
    for name, modules in found.items():
        shapes = {(m.kind, m.d_out, m.A.shape[1:], len(m.B.shape)): views[i].path for i, m in modules.items()}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise ValueError(
                f"{name}: the adapters are not of one model: it is {one[0]} {one[1]} × {tuple(one[2])} in {first}, "
                f"{other[0]} {other[1]} × {tuple(other[2])} in {second}."
            )
    return found


def _beside(views: Sequence[Adapter]) -> tuple[dict[str, Tensor], list[Finding]]:
    """The tensors beside the updates. Raises: ValueError where two adapters have them with different values."""
    tensors: dict[str, Tensor] = {}
    owners: dict[str, list[str]] = {}
    for view in views:
        for key, tensor in carried_tensors(view).items():
            if key in tensors and not (tensors[key].shape == tensor.shape and torch.equal(tensors[key], tensor)):
                raise ValueError(
                    f"{key} is trained in {owners[key][0]} and in {view.path}, with different values; whole tensors "
                    f"(modules_to_save and the like) are not merged."
                )
            tensors.setdefault(key, tensor)
            owners.setdefault(key, []).append(view.path)
    partial = [key for key, paths in owners.items() if len(paths) < len(views)]
    findings = []
    if partial:
        message = f"{len(partial)} tensors beside the updates are not in all adapters, and carried whole: {partial[0]}."
        findings.append(Finding("warning", "carried_whole", None, message))
    return tensors, findings


def _about(views: Sequence[Adapter], present: Mapping[str, Mapping[int, AdapterModule]]) -> list[Finding]:
    findings = [finding for view in views for finding in view.findings if finding.severity == "warning"]
    bases = {view.settings.base_model for view in views if view.settings.base_model}
    if len(bases) > 1:
        message = f"The adapters name different base models: {', '.join(sorted(bases))}."
        findings.append(Finding("warning", "base_models_differ", None, message))
    partial = [name for name, modules in present.items() if len(modules) < len(views)]
    if partial:
        message = f"{len(partial)} modules are not in all adapters, and count as 0 where they lack: {partial[0]}."
        findings.append(Finding("info", "partial_modules", None, message))
    return findings


Combine = Callable[[list[Tensor], Tensor], Tensor]


def _combiner(method: str, density: float | None) -> Combine | None:
    """PEFT's function from dense updates and weights to their merge; None for methods in factor space."""
    if method not in _DENSE:
        return None
    from peft.utils.merge_utils import dare_linear, task_arithmetic, ties

    if density == 1 and method == "dare":  # nothing is left out
        return lambda dense, weights: task_arithmetic(dense, weights)
    function = ties if method == "ties" else dare_linear

    def combine(dense: list[Tensor], weights: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density 1")
            merged: Tensor = function(dense, weights, density)
            return merged

    return combine


@dataclass(frozen=True)
class _Merged:
    update: LowRank
    rank: int
    kept: float  # energies
    total: float


def _merged(
    items: list[tuple[LowRank, float]], combine: Combine | None, method: str, rank: int | None, energy: float | None
) -> _Merged:
    """One module's merge, with scaling 1."""
    if method != "linear" and rank is None and energy is None:
        rank = max(update.rank for update, _ in items)
    if combine is not None:
        updates = [update.dense() for update, _ in items]
        dense = combine(updates, torch.tensor([weight for _, weight in items], dtype=updates[0].dtype))
        sigma, vectors, left = leading(dense)
        kept = _cut_at(sigma, rank, energy)
        return _result(factored(dense, vectors, left, kept), len(sigma), sigma)
    total = LowRank.sum([(update * weight).to(dtype=_wide(update)) for update, weight in items])
    if total.scaling != 1:
        total = LowRank(total.B * float(total.scaling), total.A)
    if rank is None and energy is None:
        energies = max(0.0, float(total.inner(total)))
        return _Merged(total, total.rank, energies, energies)
    sigma = total.singular_values().double()
    kept = _cut_at(sigma, rank, energy)
    return _result(total.truncate(kept) if kept < total.rank else total, total.rank, sigma)


def _wide(update: LowRank) -> torch.dtype:
    return torch.promote_types(update.dtype, torch.float32)


def _cut_at(sigma: Tensor, rank: int | None, energy: float | None) -> int:
    if energy is not None:
        return max(1, int(energy_rank(sigma, energy)))
    assert rank is not None
    return min(rank, len(sigma))


def _result(update: LowRank, rank: int, sigma: Tensor) -> _Merged:
    squares = sigma.double().square()
    return _Merged(update, rank, float(squares[: update.rank].sum()), float(squares.sum()))


def _like(modules: list[AdapterModule]) -> AdapterModule:
    """A module with the layout of these, and with the widest of their dtypes."""
    first = modules[0]
    dtype = first.dtype
    for module in modules[1:]:
        dtype = torch.promote_types(dtype, module.dtype)
    return replace(first, A=replace(first.A, dtype=dtype), B=replace(first.B, dtype=dtype))


def _config(
    views: Sequence[Adapter], present: Mapping[str, Mapping[int, AdapterModule]], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """The first adapter's config with the merge's ranks, and with what the others save beside their updates."""
    first, *others = (dict(view.settings.raw) for view in views)
    for field in _AGREE:
        if any((raw.get(field) or "none") != (first.get(field) or "none") for raw in others):
            values = [raw.get(field) for raw in (first, *others)]
            raise ValueError(f"The adapters differ in `{field}`, which one config cannot say: {values}.")
    saved = {name for view in views for name in view.settings.modules_to_save}
    first["modules_to_save"] = sorted(saved) or None
    first["fan_in_fan_out"] = any(view.settings.fan_in_fan_out for view in views)
    same = all(len(modules) == len(views) for modules in present.values())
    same = same and all(_targets(raw) == _targets(first) for raw in others)
    pruned = any(finding.code == "pruned" for view in views for finding in view.findings)
    return plain_config(first, ranks, 1.0, spell_out=not same or pruned)


def _targets(raw: Mapping[str, Any]) -> tuple[object, ...]:
    found = []
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = raw.get(field)
        found.append(frozenset(value) if isinstance(value, list | tuple | set) else value)
    return tuple(found)
