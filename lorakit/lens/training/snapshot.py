"""What an adapter looks like at one step of its training: its spectra by module and role, and the Q-V gap.

Reference: "LoRA-Lens: Training Induces Spectral Compression in Low-Rank Adapters", section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit._distributed.fsdp import unwrapped
from lorakit.lens._rows import grouped, mean
from lorakit.naming.roles import Role, group_of
from lorakit.spectral import LowRank, effective_rank, stable_rank
from lorakit.spectral.gram import svd_from_grams

if TYPE_CHECKING:
    from torch import nn

    from lorakit.lens.training.factors import Factors
    from lorakit.lens.training.gradients import GradientWatch


@dataclass(frozen=True)
class SnapshotModule:
    """One module's ΔW, scaling included. Where it is not finite the numbers are None.

    `gradient_norm`: ‖G‖_F of the loss's gradient G with respect to the module's weight, in units of the loss as it was
    gone back from. `kappa`: ‖UᵀGV‖_F / ‖G‖_F, the part of it that lies in the subspaces of ΔW, U and V its singular
    vectors; with a standard error. Both are estimates by random projections; None where gradients were not watched,
    or ΔW or G is 0.
    """

    module_name: str
    role: Role | None
    layer: int | None
    rank: int
    effective_rank: float | None
    stable_rank: float | None
    capacity_utilization: float | None
    frobenius_norm: float | None
    spectral_norm: float | None
    gradient_norm: float | None = None
    kappa: float | None = None
    kappa_stderr: float | None = None

    @property
    def group(self) -> str:
        return group_of(self.module_name)


@dataclass(frozen=True)
class SnapshotGroup:
    """Modules of one role, or all: means over those that are finite, None where there are none.

    `kappa` is √(Σ ‖UᵀGV‖² / Σ ‖G‖²) over the modules that have one.
    """

    name: str
    modules: int
    effective_rank: float | None
    stable_rank: float | None
    capacity_utilization: float | None
    kappa: float | None


@dataclass(frozen=True)
class Snapshot:
    """An adapter at one step. `unmeasured` are modules that have no one pair of factors, such as expert weights.

    `qv_gap` is the mean capacity utilization of the query projections less that of the value projections; None where
    one of them is missing.
    """

    step: int | None
    modules: tuple[SnapshotModule, ...]
    roles: tuple[SnapshotGroup, ...]
    total: SnapshotGroup
    qv_gap: float | None
    unmeasured: tuple[str, ...] = ()

    def role(self, name: str) -> SnapshotGroup | None:
        """The group of one role; None where the adapter has no such module."""
        return next((group for group in self.roles if group.name == name), None)

    def metrics(self, *, modules: bool = False) -> dict[str, float]:
        """Flat numbers under names such as ``spectral/cu_query``, as loggers take them; of every module on request."""
        found: dict[str, float | None] = {"spectral/qv_gap": self.qv_gap}
        for group in (self.total, *self.roles):
            ending = "" if group is self.total else f"_{group.name}"
            for label, value in _labelled(group):
                found[f"spectral/{label}{ending}"] = value
        if modules:
            for module in self.modules:
                for label, value in _labelled(module):
                    found[f"spectral/{label}/{module.module_name}"] = value
        return {key: value for key, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data as JSON has it: no NaN, no infinity."""
        return vars(self) | {
            "modules": [dict(vars(module)) for module in self.modules],
            "roles": [dict(vars(group)) for group in self.roles],
            "total": dict(vars(self.total)),
            "unmeasured": list(self.unmeasured),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Snapshot:
        """What `to_dict` gave. Raises: ValueError for anything else."""
        try:
            return cls(
                step=plain["step"],
                modules=tuple(SnapshotModule(**row) for row in plain["modules"]),
                roles=tuple(SnapshotGroup(**group) for group in plain["roles"]),
                total=SnapshotGroup(**plain["total"]),
                qv_gap=plain["qv_gap"],
                unmeasured=tuple(plain["unmeasured"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no snapshot of an adapter: {error!r}.") from None


def _labelled(row: SnapshotGroup | SnapshotModule) -> list[tuple[str, float | None]]:
    return [
        ("cu", row.capacity_utilization),
        ("effective_rank", row.effective_rank),
        ("stable_rank", row.stable_rank),
        ("kappa", row.kappa),
    ]


@torch.no_grad()
def snapshot(
    model: nn.Module,
    *,
    step: int | None = None,
    gradients: GradientWatch | None = None,
    adapter_name: str | None = None,
) -> Snapshot:
    """Effective and stable rank and capacity utilization of every module of an adapter in a model, by role and in all.

    Args:
        model: a PeftModel with a LORA, FISHERLORA or SPECLORA adapter, or a model that has one by transformers'
            `add_adapter`; also wrapped for training by DistributedDataParallel or torch.compile, or sharded by
            fully_shard (FSDP2): then all processes must call this, and r × r Gram matrices are exchanged where the
            sharding allows it, else single factors; ΔW is never formed. Otherwise one process can call it alone.
        step: what the snapshot is to carry as its step.
        gradients: what `lorakit.lens.watch_gradients` saw, for κ.
        adapter_name: needed where not exactly one adapter is active.
    Of DoRA and SPECLORA it is the low-rank part. Nothing of the model changes.
    Raises: TypeError, ValueError, UnsupportedModelError for a model without such an adapter; CalibrationError for one
    wrapped by FullyShardedDataParallel (FSDP1).
    """
    from lorakit.adapters.in_model import find_adapter
    from lorakit.lens.training.factors import batches, factors_of

    _, found = find_adapter(unwrapped(model), adapter_name)
    factors, unmeasured = [], []
    for module in found:
        pair = factors_of(module)
        if pair is None:
            unmeasured.append(module.name)
        else:
            factors.append(pair)
    numbers: dict[str, list[float]] = {}
    parts = [_columns(batch) for batch in batches(factors)]  # all under way on the device before any is waited for
    for names, columns in parts:
        numbers |= dict(zip(names, columns.tolist(), strict=True))
    rows = tuple(_row(one, numbers[one.name], gradients) for one in factors)
    groups, _ = grouped(rows)
    roles = tuple(_group(name, members, gradients) for name, members in groups.items())
    utilization = {group.name: group.capacity_utilization for group in roles}
    query, value = utilization.get("query"), utilization.get("value")
    gap = None if query is None or value is None else query - value
    return Snapshot(step, rows, roles, _group("all", rows, gradients), gap, tuple(unmeasured))


def _columns(batch: Sequence[Factors]) -> tuple[list[str], Tensor]:
    """Largest singular value, stable and effective rank of each module, (n, 3); NaN where it is not finite."""
    from lorakit.lens.training.factors import grams, scalings

    if batch[0].sharded:
        sigma = svd_from_grams(*grams(batch), scalings(batch)).S
    else:
        B, A = (torch.stack(parts) for parts in zip(*((one.B, one.A) for one in batch), strict=True))
        dtype = torch.promote_types(B.dtype, A.dtype)
        finite = (B.flatten(1).sum(1) + A.flatten(1).sum(1)).isfinite()
        keep = finite[:, None, None]
        update = LowRank(torch.where(keep, B, 0).to(dtype), torch.where(keep, A, 0).to(dtype), scalings(batch))
        sigma = torch.where(finite[:, None], update.singular_values(), torch.nan)
    columns = torch.stack([sigma[:, 0].double(), stable_rank(sigma).double(), effective_rank(sigma).double()], 1)
    return [one.name for one in batch], columns


def _row(one: Factors, numbers: list[float], gradients: GradientWatch | None) -> SnapshotModule:
    finite = all(map(math.isfinite, numbers))
    largest, stable, effective = numbers if finite else (None, None, None)
    seen = None if gradients is None else gradients.overlaps.get(one.name)
    return SnapshotModule(
        module_name=one.name,
        role=one.role,
        layer=one.layer,
        rank=one.rank,
        effective_rank=effective,
        stable_rank=stable,
        capacity_utilization=None if effective is None else effective / one.rank,
        frobenius_norm=None if largest is None or stable is None else largest * math.sqrt(stable),
        spectral_norm=largest,
        gradient_norm=None if seen is None else seen.gradient_norm,
        kappa=None if seen is None else seen.kappa,
        kappa_stderr=None if seen is None else seen.kappa_stderr,
    )


def _group(name: str, rows: Sequence[SnapshotModule], gradients: GradientWatch | None) -> SnapshotGroup:
    kappa = None
    watched = (
        [] if gradients is None else [gradients.overlaps[row.module_name] for row in rows if row.kappa is not None]
    )
    if watched:
        seen = math.hypot(*(one.seen_norm for one in watched))
        total = math.hypot(*(one.gradient_norm for one in watched))
        kappa = min(1.0, seen / total)
    return SnapshotGroup(
        name=name,
        modules=len(rows),
        effective_rank=mean(row.effective_rank for row in rows),
        stable_rank=mean(row.stable_rank for row in rows),
        capacity_utilization=mean(row.capacity_utilization for row in rows),
        kappa=kappa,
    )
