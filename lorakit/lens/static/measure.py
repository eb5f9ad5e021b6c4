"""The measuring part of an audit: spectra of all modules, and NaN and infinity wherever they are."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit._checks import preview
from lorakit.adapters import Adapter, AdapterModule, TensorInfo, open_adapter
from lorakit.errors import Finding
from lorakit.lens.static.report import AuditedModule
from lorakit.spectral import LowRank, effective_rank, energy_rank, knee, stable_rank

Source = str | os.PathLike[str] | nn.Module | Adapter

_ROWS = 1 << 20  # entries of a tensor looked at together


@torch.no_grad()
def measure(
    view: Adapter, thresholds: dict[str, float], findings: list[Finding], *, description: str = "audit"
) -> tuple[AuditedModule, ...]:
    """Rows for all modules, in their order; what is wrong with their values is added to `findings`.

    `description` is that of the progress bar, shown on stderr after a second.
    """
    spectra: dict[str, Tensor] = {}
    with tqdm(
        total=len(view.modules), desc=description, delay=1.0, unit="module", leave=False, disable=None
    ) as progress:
        for modules, update in view.batches():
            spectra |= _singular_values(modules, update, findings)
            progress.update(len(modules))
    numbers = _numbers(spectra, thresholds)
    return tuple(_row(view, module, spectra, numbers, findings) for module in view.modules)


def open_all(adapters: Source | Sequence[Source]) -> list[Adapter]:
    """The views of `lorakit.adapters.open_adapter` over one or several adapters. Raises: ValueError for none;
    TypeError for what is no adapter.
    """
    if isinstance(adapters, str | os.PathLike | nn.Module | Adapter):
        adapters = [adapters]
    if not isinstance(adapters, Iterable):
        raise TypeError(
            f"`adapters` must be an adapter or several: paths, PeftModels or open adapters; got "
            f"{type(adapters).__name__}."
        )
    views = [open_adapter(adapter) for adapter in adapters]
    if not views:
        raise ValueError("`adapters` must have at least one adapter; got none.")
    return views


def about_bases(views: Sequence[Adapter]) -> Iterator[Finding]:
    """A finding where adapters were made for different base models."""
    bases = sorted({view.settings.base_model for view in views if view.settings.base_model is not None})
    if len(bases) > 1:
        message = f"The adapters were made for different models, which are taken together: {preview(bases)}"
        yield Finding("warning", "different_base", None, message)


def of_adapter(view: Adapter, findings: Iterable[Finding]) -> list[Finding]:
    """Findings that say which of several adapters they are about."""
    return [replace(finding, message=f"{view.path}: {finding.message}") for finding in findings]


def about_low_rank_part(view: Adapter) -> Iterator[Finding]:
    """A finding where modules have a DoRA magnitude or a SpecLoRA mask beside the update."""
    partial = sum(module.magnitude is not None or module.mask is not None for module in view.modules)
    if partial:
        message = f"Of {partial} modules only the low-rank part is seen: the whole update needs the base weight."
        yield Finding("info", "low_rank_part_only", None, message)


def _numbers(spectra: dict[str, Tensor], thresholds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What is made of a spectrum, for all spectra of one length at a time."""
    lengths: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, sigma in spectra.items():
        lengths.setdefault((len(sigma), sigma.dtype), []).append(name)
    numbers = {}
    for names in lengths.values():
        sigma = torch.stack([spectra[name] for name in names])
        columns = [sigma[:, 0], stable_rank(sigma), effective_rank(sigma), knee(sigma)]
        columns += [energy_rank(sigma, q) for q in thresholds.values()]
        for name, row in zip(names, torch.stack([column.double() for column in columns], 1).tolist(), strict=True):
            largest, stable, effective, bend, *ks = row
            numbers[name] = {
                "frobenius_norm": largest * math.sqrt(stable),
                "spectral_norm": largest,
                "stable_rank": stable,
                "effective_rank": effective,
                "knee": int(bend),
                "energy_rank": {q: int(k) for q, k in zip(thresholds, ks, strict=True)},
            }
    return numbers


def _row(
    view: Adapter,
    module: AdapterModule,
    spectra: dict[str, Tensor],
    numbers: dict[str, dict[str, Any]],
    findings: list[Finding],
) -> AuditedModule:
    measured = numbers.get(module.name, {})
    if measured:
        measured["singular_values"] = tuple(spectra[module.name].tolist())
        measured["capacity_utilization"] = measured["effective_rank"] / module.rank
        measured["utilization"] = measured["stable_rank"] / module.rank
    return AuditedModule(
        module_name=module.name,
        role=module.role,
        layer=module.layer,
        kind=module.kind,
        d_out=module.d_out,
        d_in=module.d_in,
        rank=module.rank,
        scaling=module.scaling,
        parameters=module.parameters,
        dtype=str(module.dtype).removeprefix("torch."),
        low_rank_part_only=module.magnitude is not None or module.mask is not None,
        beside=_beside(view, module, findings),
        **measured,
    )


def _singular_values(modules: list[AdapterModule], update: LowRank, findings: list[Finding]) -> dict[str, Tensor]:
    """Singular values by module, on the CPU; none for modules that are not finite."""
    B, A, scaling = update.B, update.A, update.scaling
    assert isinstance(scaling, Tensor)
    finite = list(range(len(modules)))
    sigma = None
    edges = (B[:, 0].any(-1), A[:, :, 0].any(-1), scaling != 0)
    if update.device.type == "cpu" and all(bool(edge.all()) for edge in edges):  # none is zero, the rest will show
        with contextlib.suppress(ValueError):  # not finite
            sigma = update.singular_values()
    if sigma is None:
        states = [_state(*each, findings) for each in zip(modules, _size(B), _size(A), strict=True)]
        finite = [i for i, state in enumerate(states) if state != "non_finite"]
        regular = [i for i, state in enumerate(states) if state == "regular"]
        shape = len(modules), min(*B.shape[1:], A.shape[-1])
        sigma = B.new_zeros(shape, dtype=torch.promote_types(update.dtype, torch.float32))
        if regular:
            sigma[regular] = LowRank(B[regular], A[regular], scaling[regular]).singular_values()
    found = {}
    for i, norm in zip(finite, torch.linalg.vector_norm(sigma.double(), dim=-1)[finite].tolist(), strict=True):
        name = modules[i].name
        if math.isfinite(norm):
            found[name] = sigma[i].cpu()
        else:
            message = f"{name}: ΔW overflows: its factors are finite, their product with the scaling is not."
            findings.append(Finding("error", "non_finite", name, message))
    return found


def _size(X: Tensor) -> list[float]:
    """A number for each matrix of a batch that is 0 where it is all zeros and finite where all its entries are."""
    size = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.promote_types(X.dtype, torch.float32)).double()
    if bool(((size == 0) | ~size.isfinite()).any()):  # squares may under- or overflow
        peak = X.abs().amax((-2, -1)).double()  # NaN where there is one
        size = torch.where((size == 0) | ~size.isfinite(), peak, size)
    sizes: list[float] = size.tolist()
    return sizes


def _state(module: AdapterModule, B: float, A: float, findings: list[Finding]) -> str:
    """Whether the update can be measured ("regular"), is zero ("zero"), or has NaN or infinity ("non_finite")."""
    name = module.name
    wrong = [f"lora_{half}" for half, size in (("A", A), ("B", B)) if not math.isfinite(size)]
    if wrong:
        message = f"{name}: {' and '.join(wrong)} {'have' if len(wrong) > 1 else 'has'} NaN or infinite entries."
        findings.append(Finding("error", "non_finite", name, message))
        return "non_finite"
    if B == 0:
        findings.append(Finding("warning", "untrained", name, f"{name}: B is all zeros, as before training."))
    elif A == 0:
        findings.append(Finding("warning", "zero_update", name, f"{name}: A is all zeros, so there is no update."))
    elif module.scaling == 0:
        findings.append(Finding("warning", "zero_update", name, f"{name}: the scaling is 0, so there is no update."))
    return "regular" if A and B and module.scaling else "zero"


def _beside(view: Adapter, module: AdapterModule, findings: list[Finding]) -> dict[str, dict[str, float]]:
    """Statistics of the mask and of the magnitudes; a finding for those, and for a bias, that are not finite."""
    found = {}
    for label, info in (("d", module.mask), ("magnitude", module.magnitude), ("lora_bias", module.bias)):
        if info is None:
            continue
        values = view.tensor(info).double().flatten()
        if not bool(values.isfinite().all()):
            message = f"{module.name}: {info.key} has NaN or infinite entries."
            findings.append(Finding("error", "non_finite", module.name, message))
        elif values.numel():
            values = values + 1 if label == "d" else values
            numbers = torch.stack((values.min(), values.max(), values.mean(), values.std(correction=0)))
            found[label] = {
                "size": values.numel(),
                **dict(zip(("min", "max", "mean", "std"), numbers.tolist(), strict=True)),
            }
    return found


def check_extras(view: Adapter, findings: list[Finding]) -> None:
    """Findings for NaN and infinity in the tensors beside the updates."""
    for info in (extra.info for extra in view.extras):
        if info.dtype is None or not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            continue
        if not all(math.isfinite(size) for size in _row_sizes(view, info)):
            message = f"{info.key} has NaN or infinite entries."
            findings.append(Finding("error", "non_finite", info.key, message))


def _row_sizes(view: Adapter, info: TensorInfo) -> Iterator[float]:
    row = max(1, math.prod(info.shape[1:]))
    for rows in view.source.rows(info.key, max(1, _ROWS // row)):
        if rows.numel():
            yield _size(rows.reshape(1, 1, -1))[0]
