"""From an adapter's factors to spectra: one row of numbers for each module, and findings about its values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit.adapters import Adapter, AdapterModule, TensorInfo
from lorakit.adapters.adapter import Kind, Read
from lorakit.adapters.experts import expert_name
from lorakit.errors import Finding
from lorakit.lens._rows import ModuleRow
from lorakit.lens.static.stacks import merged_findings, one_by_one
from lorakit.naming.roles import Role
from lorakit.spectral import LowRank, effective_rank, energy_rank, hard_threshold_rank, knee, stable_rank

_ROWS = 1 << 20  # entries of a tensor that are checked together


@dataclass(frozen=True)
class ExpertSpread:
    """How the experts of a group differ. `zero`: how many have no update. `quantiles`: of each number, over the experts
    whose update is finite: "min", "p10", "median", "p90" and "max".
    """

    count: int
    zero: int
    quantiles: dict[str, dict[str, float]]


@dataclass(frozen=True)
class AuditedModule(ModuleRow):
    """The spectrum of one module's ΔW, scaling included, and the numbers that follow from it.

    If the update is not finite, the numbers are None and the singular values empty. `energy_rank`: for each share of
    ‖ΔW‖_F² (the key), the smallest rank that keeps it. `low_rank_part_only`: the module also has a DoRA magnitude or a
    SpecLoRA mask, so B A is not the whole update; `whole_update`: it is measured, from the base weight, and `rank` is
    the largest that it can have. `beside` has the size, minimum, maximum, mean and standard deviation of the magnitudes
    ("magnitude"), of d ("d", not d − 1), and of B's bias ("lora_bias"). `top1_share`: σ₁² / Σ σ².
    `hard_threshold_rank`: see `lorakit.spectral.hard_threshold_rank`, with β = 1 because a rank-r update has r
    singular values, those of an r × r core. `base_norm` and `relative_norm`: ‖W‖_F of the base weight and
    ‖ΔW‖_F / ‖W‖_F, where the base was given.

    A row with `experts` is a group of them: norms and singular values are of all their updates together, σ_k being
    √Σ_e σ_ek²; stable and effective rank, utilization and knee are medians, and an energy rank is one that suffices for
    every expert. A row of one expert has the `stack`, the parameter that it is stored in.
    """

    module_name: str
    role: Role | None
    layer: int | None
    kind: Kind
    d_out: int
    d_in: int
    rank: int
    scaling: float
    parameters: int
    dtype: str
    low_rank_part_only: bool
    beside: dict[str, dict[str, float]]
    singular_values: tuple[float, ...] = ()
    frobenius_norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    capacity_utilization: float | None = None
    utilization: float | None = None
    energy_rank: dict[str, int] | None = None
    knee: int | None = None
    top1_share: float | None = None
    hard_threshold_rank: int | None = None
    base_norm: float | None = None
    relative_norm: float | None = None
    stack: str | None = None
    experts: ExpertSpread | None = None
    whole_update: bool = False

    @property
    def parameters_of_a_rank(self) -> int:
        """What one unit of rank costs, for all experts of a group."""
        return (self.experts.count if self.experts else 1) * (self.d_out + self.d_in)

    @property
    def bytes_per_entry(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)


@torch.no_grad()
def measure(
    view: Adapter, thresholds: dict[str, float], findings: list[Finding], *, description: str = "audit"
) -> tuple[AuditedModule, ...]:
    """One row for each module, and for each expert of a stack, in the adapter's order; problems with their values are
    added to `findings`.

    Args:
        thresholds: shares of ‖ΔW‖_F² for `AuditedModule.energy_rank`, by the key they get there.
        description: label of the progress bar, which appears on stderr after a second.
    Raises: AdapterFileError if a tensor cannot be read.
    """
    spectra: dict[str, Tensor] = {}
    found: list[Finding] = []
    with tqdm(
        total=len(view.modules), desc=description, delay=1.0, unit="module", leave=False, disable=None
    ) as progress:
        for modules, update in view.batches():
            spectra |= _singular_values(*one_by_one(modules, update), found)
            progress.update(len(modules))
    findings += merged_findings(found, view.modules)
    numbers = _numbers(spectra, thresholds)
    rows = []
    with view.source.reader() as read:
        for module in view.modules:
            beside = _beside_statistics(read, module.stored, findings)
            if module.experts is None:
                rows.append(_row(module, module.name, spectra, numbers, beside))
            for expert in range(module.experts or 0):
                rows.append(_row(module, expert_name(module.name, expert), spectra, numbers, beside))
    return tuple(rows)


def _numbers(spectra: dict[str, Tensor], thresholds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The numbers of each module, computed for all spectra of one length together."""
    lengths: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, sigma in spectra.items():
        lengths.setdefault((len(sigma), sigma.dtype), []).append(name)
    numbers = {}
    for names in lengths.values():
        sigma = torch.stack([spectra[name] for name in names])
        columns = [sigma[:, 0], stable_rank(sigma), effective_rank(sigma), knee(sigma), hard_threshold_rank(sigma)]
        columns += [energy_rank(sigma, q) for q in thresholds.values()]
        for name, row in zip(names, torch.stack([column.double() for column in columns], 1).tolist(), strict=True):
            largest, stable, effective, bend, above, *ks = row
            numbers[name] = {
                "frobenius_norm": largest * math.sqrt(stable),
                "spectral_norm": largest,
                "stable_rank": stable,
                "effective_rank": effective,
                "knee": int(bend),
                "top1_share": 1 / stable if stable else 0.0,
                "hard_threshold_rank": int(above),
                "energy_rank": {q: int(k) for q, k in zip(thresholds, ks, strict=True)},
            }
    return numbers


def _row(
    module: AdapterModule,
    name: str,
    spectra: dict[str, Tensor],
    numbers: dict[str, dict[str, Any]],
    beside: dict[str, dict[str, float]],
) -> AuditedModule:
    measured = numbers.get(name, {})
    if measured:
        measured["singular_values"] = tuple(spectra[name].tolist())
        measured["capacity_utilization"] = measured["effective_rank"] / module.rank
        measured["utilization"] = measured["stable_rank"] / module.rank
    return AuditedModule(
        module_name=name,
        role=module.role,
        layer=module.layer,
        kind=module.kind,
        d_out=module.d_out,
        d_in=module.d_in,
        rank=module.rank,
        scaling=module.scaling,
        parameters=module.parameters // (module.experts or 1),
        dtype=str(module.stored.dtype).removeprefix("torch."),
        low_rank_part_only=module.magnitude is not None or module.mask is not None,
        beside=beside,
        stack=module.name if module.experts is not None else None,
        whole_update=module.whole_of is not None,
        **measured,
    )


def _singular_values(modules: list[AdapterModule], update: LowRank, findings: list[Finding]) -> dict[str, Tensor]:
    """Singular values by module name, on the CPU; modules that are not finite are left out."""
    B, A, scaling = update.B, update.A, update.scaling
    assert isinstance(scaling, Tensor)
    finite = list(range(len(modules)))
    sigma = None
    edges = (B[:, 0].any(-1), A[:, :, 0].any(-1), scaling != 0)
    if update.device.type == "cpu" and all(bool(edge.all()) for edge in edges):  # no factor is zero
        with contextlib.suppress(ValueError):  # raised if an entry is not finite
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
            message = f"{name}: ΔW overflows: the factors are finite, but their product with the scaling is not."
            findings.append(Finding("error", "non_finite", name, message))
    return found


def _size(X: Tensor) -> list[float]:
    """A size for each matrix of a batch: 0 if all entries are zero, finite if all entries are finite."""
    size = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.promote_types(X.dtype, torch.float32)).double()
    if bool(((size == 0) | ~size.isfinite()).any()):  # the squares may underflow or overflow
        peak = X.abs().amax((-2, -1)).double()  # NaN if any entry is
        size = torch.where((size == 0) | ~size.isfinite(), peak, size)
    sizes: list[float] = size.tolist()
    return sizes


def _state(module: AdapterModule, B: float, A: float, findings: list[Finding]) -> str:
    """The kind of update: "regular", "zero", or "non_finite" (NaN or infinite entries)."""
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


def _beside_statistics(read: Read, module: AdapterModule, findings: list[Finding]) -> dict[str, dict[str, float]]:
    """Statistics of mask, magnitudes and bias; a finding for each of them that is not finite."""
    found = {}
    for label, info in (("d", module.mask), ("magnitude", module.magnitude), ("lora_bias", module.bias)):
        if info is None:
            continue
        values = read(info.key).double().flatten()
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
    """Findings for NaN and infinite entries in the tensors that belong to no update."""
    for info in (extra.info for extra in view.extras):
        if info.dtype is None or not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            continue
        if not all(math.isfinite(size) for size in _row_sizes(view, info)):
            message = f"{info.key} has NaN or infinite entries."
            findings.append(Finding("error", "non_finite", info.key, message))


def _row_sizes(view: Adapter, info: TensorInfo) -> Iterator[float]:
    """The sizes of a tensor's slices, which are read one at a time."""
    row = max(1, math.prod(info.shape[1:]))
    for rows in view.source.rows(info.key, max(1, _ROWS // row)):
        if rows.numel():
            yield _size(rows.reshape(1, 1, -1))[0]
