"""How the output directions of an adapter's updates lie to each other: across layers, and within a layer.

References: Tian et al., "Spectral Surgery", 2026, §3.2, Eq. 2–3, Fig. 1 and App. B.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit._report import Report, ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.errors import Finding
from lorakit.lens.static.measure import about_low_rank_part
from lorakit.naming.roles import group_of, layer_prefix
from lorakit.spectral import leading_similarity, random_subspace_overlap, topk_overlap

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class AlignedGroup:
    """Modules of one role and output width, in the order of their layers: `similarity` and `overlap` are n × n.

    `similarity`: |cos| of the leading output directions. `overlap`: ‖U_aᵀ U_b‖_F² / k of the `k` leading ones, `k`
    being the one asked for or, if that is less, the smallest rank of an update in the group. By chance they are
    `random_similarity`, the mean |cos| of random directions, and `random_overlap`, k / d_out. The means are over pairs
    of different modules, None where there is one module.
    """

    name: str
    modules: tuple[str, ...]
    layers: tuple[int | None, ...]
    d_out: int
    k: int
    similarity: tuple[tuple[float, ...], ...]
    overlap: tuple[tuple[float, ...], ...]
    similarity_mean: float | None
    overlap_mean: float | None
    random_similarity: float
    random_overlap: float

    @property
    def labels(self) -> list[str]:
        """The layers, where these tell the modules apart; else their names, without what these end in alike."""
        if None not in self.layers and len(set(self.layers)) == len(self.layers):
            return [str(layer) for layer in self.layers]
        steps = [name.split(".") for name in self.modules]
        while len(steps) > 1 and all(len(s) > 1 and s[-1] == steps[0][-1] for s in steps):
            steps = [s[:-1] for s in steps]
        return [".".join(s) for s in steps]


@dataclass(frozen=True)
class AlignedPair:
    """The attention's output projection and the MLP's down projection of one layer, compared as in `AlignedGroup`."""

    output: str
    down: str
    layer: int
    d_out: int
    k: int
    similarity: float
    overlap: float
    random_similarity: float
    random_overlap: float


@dataclass(frozen=True)
class AlignmentReport(Report):
    """What `lorakit.lens.alignment` found, with the `k` that was asked for."""

    path: str
    peft_type: str
    k: int
    roles: tuple[AlignedGroup, ...]
    within_layer: tuple[AlignedPair, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`roles`, `within_layer`, `summary` and `findings` as JSON has them: no NaN, no infinity."""
        return {
            "roles": [asdict(group) for group in self.roles],
            "within_layer": [asdict(pair) for pair in self.within_layer],
            "summary": {"path": self.path, "peft_type": self.peft_type, "k": self.k},
            "findings": [asdict(finding) for finding in self.findings],
        }

    def plot(self, directory: str | os.PathLike[str]) -> list[Path]:  # type: ignore[override]
        """`lorakit.lens.write_plots` of this report."""
        from lorakit.lens.render.plots import write_plots

        return write_plots(self, directory)


@torch.no_grad()
def alignment(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, *, k: int = 4, adapter_name: str | None = None
) -> AlignmentReport:
    """The geometry of an adapter's output directions: a directory, a file, a Hub id, a PeftModel or an open adapter.

    For every role, between all layers: |cos| of the leading left singular vectors of ΔW, and the overlap of the
    subspaces of the `k` leading ones; within each layer, between output and down projection. Each with what chance
    gives. Updates that are zero, or not finite, are left out and among the findings. Of DoRA and SPECLORA it is the
    low-rank part. Where the k-th and the next singular value are equal, the subspace is one of many.

    Raises: AdapterFileError, UnsupportedModelError for what cannot be read; ValueError for a `k` below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}.")
    view = open_adapter(adapter, adapter_name=adapter_name)
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
    """The leading left singular vectors, at most k and as many as the update's rank; None for no update."""
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
    """The mean off the diagonal."""
    n = len(square)
    return float((square.double().sum() - square.double().trace()) / (n * (n - 1))) if n > 1 else None


def random_similarity(d: int) -> float:
    """Mean |cos| of two independent uniformly random directions: Γ(d/2) / (√π Γ((d+1)/2)), near √(2 / (π d))."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def _pairs(modules: Sequence[AdapterModule], outputs: dict[str, Tensor], downs: dict[str, Tensor]) -> list[AlignedPair]:
    """All pairs of an output and a down projection in one layer of one stack, of one width."""
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
