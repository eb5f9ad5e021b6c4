"""How the output directions of an adapter's updates relate to each other: across layers, and within a layer.

References: Tian et al., "Spectral Surgery", 2026, §3.2, Eq. 2–3, Fig. 1 and App. B.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._checks import check_integer
from lorakit._report import ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.errors import Finding
from lorakit.lens._sources import about_low_rank_part, matrices_of
from lorakit.lens.static.alignment_report import AlignedGroup, AlignedPair, AlignmentReport
from lorakit.lens.static.chance import random_similarity
from lorakit.naming.roles import group_of, layer_prefix
from lorakit.spectral import leading_similarity, random_subspace_overlap, topk_overlap

if TYPE_CHECKING:
    from torch import nn


@torch.no_grad()
def alignment(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, *, k: int = 4, adapter_name: str | None = None
) -> AlignmentReport:
    """Compare the output directions of an adapter's updates across layers, for each role, and within each layer.

    Two numbers are given for each pair of modules, with what chance gives: |cos| of the leading left singular vectors
    of ΔW, and the overlap ‖U_aᵀ U_b‖_F² / k of the `k` leading ones. Across layers, modules of one role are compared;
    within a layer, the attention's output projection and the MLP's down projection. Updates that are zero or not
    finite are left out, with a finding. For DoRA and SPECLORA it is the low-rank part. If the k-th and the next
    singular value are equal, the subspace is not unique.

    Args:
        adapter: a directory, a .safetensors or .bin file, a Hub id, a PeftModel, or an open adapter.
        k: how many leading directions of each update to compare.
        adapter_name: which adapter of a PeftModel; by default the active one.
    Raises: AdapterFileError, UnsupportedModelError for an adapter that cannot be read; ValueError for a `k` below 1.

    Example:
        >>> import lorakit, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = torch.nn.ModuleDict({"layers": torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 6))})
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> for name, B in model.named_parameters():
        ...     _ = torch.nn.init.eye_(B) if "lora_B" in name else None
        >>> report = lorakit.lens.alignment(model, k=2)
        >>> [(group.name, group.k) for group in report.roles]
        [('0', 2), ('1', 2)]
    """
    check_integer("k", k)
    view = matrices_of(open_adapter(adapter, adapter_name=adapter_name))
    findings = list(view.findings)
    groups: dict[tuple[str, int], list[AdapterModule]] = {}
    for module in view.modules:
        groups.setdefault((group_of(module.name), module.d_out), []).append(module)
    widths = {name: sum(group == name for group, _ in groups) for name, _ in groups}
    aligned: list[AlignedGroup] = []
    writing: dict[str, dict[str, Tensor]] = {"output": {}, "down": {}}  # bases by module
    with tqdm(total=len(view.modules), desc="alignment", delay=1.0, unit="module", leave=False, disable=None) as bar:
        for (name, d_out), modules in groups.items():
            bases: dict[str, Tensor] = {}
            for module in modules:
                basis = _leading(view, module, k, findings)
                if basis is not None:
                    bases[module.name] = basis
                bar.update()
            if bases:
                found = [module for module in modules if module.name in bases]
                label = name if widths[name] == 1 else f"{name} ({d_out})"
                aligned.append(_group(label, found, list(bases.values())))
            if name in writing:
                writing[name] |= bases
    findings += about_low_rank_part(view)
    return AlignmentReport(
        path=view.path,
        peft_type=view.settings.peft_type,
        k=k,
        roles=tuple(aligned),
        within_layer=tuple(_pairs(view.modules, writing["output"], writing["down"])),
        findings=ordered(findings),
    )


def _leading(view: Adapter, module: AdapterModule, k: int, findings: list[Finding]) -> Tensor | None:
    """The leading left singular vectors, at most k and at most the update's rank; None if there is no update."""
    update = view.factors(module)
    svd = update.svd() if all(bool(half.isfinite().all()) for half in (update.B, update.A)) else None
    if svd is None or not bool(svd.S.isfinite().all()):
        message = f"{module.name}: the update is not finite."
        findings.append(Finding("error", "non_finite", module.name, message))
        return None
    rank = int(update.numerical_rank())
    if rank == 0:
        message = f"{module.name}: the update is zero, as before training."
        findings.append(Finding("warning", "zero_update", module.name, message))
        return None
    return svd.U[:, : min(k, rank)].clone()


def _group(name: str, modules: Sequence[AdapterModule], bases: Sequence[Tensor]) -> AlignedGroup:
    k = min(basis.shape[-1] for basis in bases)
    stacked = torch.stack([basis[:, :k].to(device=bases[0].device) for basis in bases])
    similarity = torch.stack([leading_similarity(basis, stacked) for basis in stacked])
    overlap = torch.stack([topk_overlap(basis, stacked, k) for basis in stacked])
    d_out = modules[0].d_out
    return AlignedGroup(
        name=name,
        modules=tuple(module.name for module in modules),
        layers=tuple(module.layer for module in modules),
        d_out=d_out,
        k=k,
        similarity=tuple(map(tuple, similarity.tolist())),
        overlap=tuple(map(tuple, overlap.tolist())),
        similarity_mean=_between(similarity),
        overlap_mean=_between(overlap),
        random_similarity=random_similarity(d_out),
        random_overlap=random_subspace_overlap(d_out, k, k),
    )


def _between(square: Tensor) -> float | None:
    """The mean over the entries off the diagonal; None for a single module."""
    n = len(square)
    return float((square.double().sum() - square.double().trace()) / (n * (n - 1))) if n > 1 else None


def _pairs(modules: Sequence[AdapterModule], outputs: dict[str, Tensor], downs: dict[str, Tensor]) -> list[AlignedPair]:
    """All pairs of an output and a down projection with equal widths in the same layer of the same stack."""
    by_layer: dict[str, tuple[list[str], list[str]]] = {}
    layers = {module.name: module.layer for module in modules}
    for i, names in enumerate((outputs, downs)):
        for name in names:
            if layers[name] is not None:
                by_layer.setdefault(layer_prefix(name) or name, ([], []))[i].append(name)
    pairs = []
    for first, second in by_layer.values():
        for output, down in ((o, d) for o in first for d in second):
            U, V = outputs[output], downs[down]
            layer, d_out = layers[output], len(U)
            if layer is None or len(V) != d_out:
                continue
            k = min(U.shape[-1], V.shape[-1])
            V = V.to(device=U.device)
            pairs.append(
                AlignedPair(
                    output=output,
                    down=down,
                    layer=layer,
                    d_out=d_out,
                    k=k,
                    similarity=float(leading_similarity(U, V)),
                    overlap=float(topk_overlap(U, V, k)),
                    random_similarity=random_similarity(d_out),
                    random_overlap=random_subspace_overlap(d_out, k, k),
                )
            )
    return pairs
