"""Compare the weights of a model before and after fine-tuning, by their singular values and vectors.

References: Si et al., "Weight Spectra Induced Efficient Model Adaptation", 2025 (spectra, same-index cosines);
Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024 (intruder dimensions).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import check_integer, check_number, preview
from lorakit._report import ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.adapters.base_weights import BaseWeights, open_base_weights, readable
from lorakit.errors import Finding
from lorakit.lens._rows import grouped
from lorakit.lens._sources import matrices_of
from lorakit.lens.static.weight_vectors import update_numbers, vector_numbers
from lorakit.lens.static.weights_report import ComparedWeight, WeightsReport, summarize
from lorakit.naming.roles import layer_of, role_of
from lorakit.spectral import residual_ratio

if TYPE_CHECKING:
    from torch import nn

    Model = str | os.PathLike[str] | nn.Module


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
    """Compare the matrices of a model before and after fine-tuning, and optionally the change with an adapter's.

    Names must be equal in both models. One weight is in memory at a time, in float32 (float64 for float64 weights).
    Where both sides of it exceed 1024, its `rank` leading triplets come from a block Krylov method whose residuals are
    checked, and from full SVDs where it does not converge; ``rank=None`` takes full SVDs of every weight.

    An intruder is one of the `top_k` leading singular vectors of W' whose |cos| with every singular vector of W is
    below `intruder_below`; vectors of singular value 0 are ignored in both. Vectors of singular values that are too
    close to tell apart (within 16 spacings of the largest) are compared as a subspace.

    Args:
        base, fine_tuned: directories of safetensors (sharded or not), .safetensors files, or modules in memory.
        adapter: an adapter that approximates the change: a path, a Hub id, a PeftModel or an open adapter.
        modules: a regular expression for whole module names, or names as in PEFT's `target_modules`; by default all
            matrices.
        rank: how many leading singular values and same-index cosines to keep, average, and take the shift of the
            spectrum over; None for all.
        top_k: how many leading singular vectors of W' to check for intruders.
        intruder_below: the |cos| below which a singular vector of W' is an intruder.
        energy: the share of ‖ΔW‖_F² that `update_energy_rank` keeps.
        adapter_name: which adapter of a PeftModel; by default the active one.
        device: where to compute; by default where the weights are.
    Raises: AdapterFileError, UnsupportedModelError for a model that cannot be read or has adapters attached; ValueError
        for options out of range.

    Example:
        >>> import copy, lorakit, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> tuned = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     tuned[0].weight[0] += 1
        >>> report = lorakit.lens.compare_weights(base, tuned)
        >>> report.modules[0].update_energy_rank
        1
    """
    if rank is not None:
        check_integer("rank", rank)
    check_integer("top_k", top_k)
    check_number("intruder_below", intruder_below, above=0, most=1)
    check_number("energy", energy, above=0, most=1)
    options = _Options(rank, top_k, intruder_below, energy)
    before, after = open_base_weights(base), open_base_weights(fine_tuned)
    view = None if adapter is None else matrices_of(open_adapter(adapter, adapter_name=adapter_name))
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
        total=summarize("all", rows),
        roles=tuple(summarize(name, group) for name, group in groups.items()),
        findings=ordered(findings),
    )


def _module_of(key: str) -> str:
    return key.removesuffix(".weight")


def _common(
    before: BaseWeights, after: BaseWeights, modules: str | Sequence[str] | None, findings: list[Finding]
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Keys of the matrices to compare, and the modules that only the base, or only the fine-tuned model, has."""
    chosen = [
        {key: info for key, info in checkpoint.infos.items() if len(info.shape) == 2 and _is_selected(key, modules)}
        for checkpoint in (before, after)
    ]
    first, second = chosen
    only_first = tuple(_module_of(key) for key in first if key not in second)
    only_second = tuple(_module_of(key) for key in second if key not in first)
    for label, lone in (("the base model", only_first), ("the fine-tuned model", only_second)):
        if lone:
            message = f"{len(lone)} matrices are only in {label}: {preview(lone)}"
            findings.append(Finding("warning", "only_in_one", None, message))
    names = []
    for key in (key for key in first if key in second):
        name = _module_of(key)
        if first[key].shape != second[key].shape:
            message = f"{name}: the shapes differ: {first[key].shape} and {second[key].shape}."
            findings.append(Finding("error", "shape_mismatch", name, message))
        elif not (readable(first[key]) and readable(second[key])):
            dtypes = f"{first[key].dtype} and {second[key].dtype}"
            message = f"{name}: weights in {dtypes} cannot be compared; float16, bfloat16, float32 and float64 can."
            findings.append(Finding("error", "unsupported_dtype", name, message))
        elif 0 not in first[key].shape:
            names.append(key)
    if not any(key in second for key in first):
        message = "The models have no matrix in common" + ("." if modules is None else " that `modules` matches.")
        findings.append(Finding("error", "nothing_in_common", None, message))
    return names, only_first, only_second


def _is_selected(key: str, modules: str | Sequence[str] | None) -> bool:
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
    """The row of one weight; without numbers, and with a finding, if it is not finite."""
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
    vectors = vector_numbers(W, tuned, rank=options.rank, top_k=options.top_k, intruder_below=options.intruder_below)
    row = replace(row, **vectors, **update_numbers(update, W, options.energy, rank=options.rank))
    if view is None or module is None:
        return row
    shape = (module.d_out, module.d_in)
    # A config has one fan_in_fan_out for all modules, so trust the shape where it settles the layout.
    if update.shape == shape[::-1] and (update.shape != shape or module.kind == "embedding" or module.fan_in_fan_out):
        update = update.mT
    if update.shape != shape:
        message = (
            f"{name}: the adapter's update is {module.d_out} × {module.d_in}, but the weight {tuple(update.shape)}."
        )
        findings.append(Finding("error", "shape_mismatch", name, message))
        return row
    residual = float(residual_ratio(update, view.factors(module).to(device=update.device)))
    if not math.isfinite(residual):
        findings.append(Finding("error", "non_finite", name, f"{name}: the adapter's update is not finite."))
        return row
    return replace(row, residual=residual, low_rank_part_only=module.magnitude is not None or module.mask is not None)


def _about_adapter(
    adapted: dict[str, AdapterModule],
    rows: Iterable[ComparedWeight],
    unchanged: Iterable[str],
    findings: list[Finding],
) -> None:
    """Findings for modules that the adapter updates but the comparison does not show."""
    same = [name for name in unchanged if name in adapted]
    seen = {row.module_name for row in rows} | set(unchanged)
    missing = [name for name in adapted if name not in seen]
    for code, names, what in (
        ("adapted_unchanged", same, "are unchanged in the fine-tuned model, although the adapter updates them"),
        ("adapted_missing", missing, "of the adapter are not among the compared weights"),
    ):
        if names:
            message = f"{len(names)} modules {what}: {preview(names)}"
            findings.append(Finding("warning", code, None, message))
