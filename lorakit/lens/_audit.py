"""Spectra, ranks and findings of an adapter, from its factors alone: no base model, no data.

References: Gradience (stable rank, utilization, energy ranks); LoRA-Lens (effective rank, capacity utilization).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit.adapters import Adapter, AdapterModule, TensorInfo, open_adapter
from lorakit.allocation import read_budget
from lorakit.errors import Finding
from lorakit.lens._report import AuditedModule, AuditReport, summarize
from lorakit.lens._suggestions import suggest
from lorakit.spectral import LowRank, effective_rank, energy_rank, knee, stable_rank

if TYPE_CHECKING:
    from torch import nn

THRESHOLDS = (0.9, 0.95, 0.99)
UNUSED_BELOW = 0.25  # utilization: much room
DOMINANT_ABOVE = 0.5  # of Σ ‖ΔW‖_F², with MANY modules or more
MANY = 4

_SEVERITIES = ("error", "warning", "info")
_ROWS = 1 << 20  # entries of a tensor looked at together


def audit(
    adapter: str | os.PathLike[str] | nn.Module | Adapter,
    *,
    energy: float = 0.9,
    suggest_ranks: bool = False,
    budget: int | str | None = None,
    adapter_name: str | None = None,
) -> AuditReport:
    """Audit an adapter: a directory, a file, a Hub id, a PeftModel, or an open `lorakit.adapters.Adapter`.

    Per module, role and layer: norms, stable and effective rank, capacity utilization CU = effective rank / r,
    utilization = stable rank / r, energy ranks k@q, and the knee of the spectrum; all of ΔW, scaling included. Of DoRA
    and SPECLORA it is the low-rank part, and labelled so. What is wrong with the adapter is among the findings; only
    what cannot be read at all is an error.

    Args:
        energy: the share of each ‖ΔW‖_F² that suggested ranks keep, beside k@0.9, 0.95 and 0.99.
        suggest_ranks: also suggest ranks: global median and p90, per module, by knee and by entropy.
        budget: also suggest ranks under a budget, by greedy energy per parameter: a number of parameters, or a string
            such as "2M" (parameters) or "4MB" (bytes, in the dtype they are stored in). Implies `suggest_ranks`.
        adapter_name: which adapter of a PeftModel, if not the active one.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read; ValueError for an `energy` outside (0, 1],
        or a budget that does not cover rank 1 in every module.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be a share in (0, 1]; got {energy}.")
    if budget is not None:
        read_budget(budget)
    view = open_adapter(adapter, adapter_name=adapter_name)
    findings = list(view.findings)
    thresholds = {str(q): q for q in sorted({*THRESHOLDS, float(energy)})}
    rows: dict[str, AuditedModule] = {}
    with tqdm(total=len(view.modules), desc="audit", delay=1.0, unit="module", leave=False, disable=None) as progress:
        for modules, update in view.batches():
            for module, row in zip(modules, _measure(view, modules, update, thresholds, findings), strict=True):
                rows[module.name] = row
            progress.update(len(modules))
    ordered = tuple(rows[module.name] for module in view.modules)
    _check_extras(view, findings)
    findings += _about_modules(ordered)
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    wanted = suggest_ranks or budget is not None
    finite = [row for row in ordered if row.energy_rank is not None]
    groups: dict[str, list[AuditedModule]] = {}
    layers: dict[int, list[AuditedModule]] = {}
    for row in ordered:
        groups.setdefault(row.group, []).append(row)
        if row.layer is not None:
            layers.setdefault(row.layer, []).append(row)
    return AuditReport(
        path=view.path,
        peft_type=view.settings.peft_type,
        base_model=view.settings.base_model,
        energy=energy,
        modules=ordered,
        total=summarize("all", ordered, ordered),
        roles=tuple(summarize(name, group, ordered) for name, group in groups.items()),
        layers=tuple(summarize(str(layer), layers[layer], ordered) for layer in sorted(layers)),
        parameters_beside=sum(extra.info.numel for extra in view.extras)
        + sum(info.numel for module in view.modules for info in module.extras),
        suggestions=tuple(suggest(finite, str(float(energy)), budget)) if wanted else (),
        findings=tuple(findings),
    )


@torch.no_grad()
def _measure(
    view: Adapter, modules: list[AdapterModule], update: LowRank, thresholds: dict[str, float], findings: list[Finding]
) -> list[AuditedModule]:
    """Rows for a batch of modules of one shape."""
    sizes = [_size(update.B), _size(update.A)]
    states = [_state(module, B, A, findings) for module, B, A in zip(modules, *sizes, strict=True)]
    regular = [i for i, state in enumerate(states) if state == "regular"]
    sigma = update.B.new_zeros(len(modules), min(*update.B.shape[1:], update.A.shape[-1]), dtype=torch.float32)
    if regular:
        chosen = update
        if len(regular) < len(modules):
            index = torch.tensor(regular, device=update.device)
            assert isinstance(update.scaling, Tensor)
            chosen = LowRank(update.B[index], update.A[index], update.scaling[index])
        measured = chosen.singular_values()
        sigma = sigma.to(measured.dtype)
        sigma[regular] = measured
    sigma = sigma.cpu()
    columns = [sigma[:, 0], stable_rank(sigma), effective_rank(sigma), knee(sigma)]
    columns += [energy_rank(sigma, q) for q in thresholds.values()]
    table = torch.stack([column.double() for column in columns], 1).tolist()
    rows = []
    for module, state, spectrum, numbers in zip(modules, states, sigma.tolist(), table, strict=True):
        largest, stable, effective, bend, *ks = numbers
        norm = largest * math.sqrt(stable) if math.isfinite(stable) else math.inf
        if state == "regular" and not math.isfinite(norm):
            message = f"{module.name}: ΔW overflows: its factors are finite, their product with the scaling is not."
            findings.append(Finding("error", "non_finite", module.name, message))
            state = "non_finite"
        row = AuditedModule(
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
            **(
                {}
                if state == "non_finite"
                else {
                    "singular_values": tuple(spectrum),
                    "frobenius_norm": norm,
                    "spectral_norm": largest,
                    "stable_rank": stable,
                    "effective_rank": effective,
                    "capacity_utilization": effective / module.rank,
                    "utilization": stable / module.rank,
                    "energy_rank": {q: int(k) for q, k in zip(thresholds, ks, strict=True)},
                    "knee": int(bend),
                }
            ),
        )
        rows.append(row)
    return rows


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


def _check_extras(view: Adapter, findings: list[Finding]) -> None:
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


def _about_modules(rows: tuple[AuditedModule, ...]) -> Iterator[Finding]:
    for row in rows:
        if row.rank > min(row.d_out, row.d_in):
            message = (
                f"{row.module_name}: rank {row.rank} is above min(d_out, d_in) = {min(row.d_out, row.d_in)}, which is "
                f"all that an update can have."
            )
            yield Finding("warning", "rank_above_dimension", row.module_name, message)
    partial = [row for row in rows if row.low_rank_part_only]
    if partial:
        kinds = sorted({label for row in partial for label in row.beside if label != "lora_bias"})
        message = (
            f"Of {len(partial)} modules only the low-rank part is measured, with statistics of "
            f"{' and '.join(kinds) or 'what is beside it'}: the whole update needs the base weight."
        )
        yield Finding("info", "low_rank_part_only", None, message)
    trained = [row for row in rows if row.frobenius_norm]
    if not trained:
        return
    largest = max(trained, key=lambda row: row.frobenius_norm or 0.0)
    peak = largest.frobenius_norm or 1.0
    share = 1 / sum(((row.frobenius_norm or 0.0) / peak) ** 2 for row in trained)
    if share > DOMINANT_ABOVE and len(trained) >= MANY:
        message = f"{largest.module_name} has {share:.0%} of the energy Σ ‖ΔW‖_F² of all {len(trained)} modules."
        yield Finding("warning", "dominant_module", largest.module_name, message)
    unused = [row for row in trained if (row.utilization or 0.0) < UNUSED_BELOW]
    if 2 * len(unused) > len(trained):
        message = (
            f"{len(unused)} of {len(trained)} modules use less than {UNUSED_BELOW:.0%} of their rank (stable rank / r)."
        )
        yield Finding("info", "unused_capacity", None, message)
