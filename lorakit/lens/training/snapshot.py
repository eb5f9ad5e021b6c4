"""An adapter at one step of its training: spectra by module and role, and the Q–V gap.

Reference: "LoRA-Lens: Training Induces Spectral Compression in Low-Rank Adapters", section 2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lorakit._distributed.fsdp import unwrapped
from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import number
from lorakit._report import Report
from lorakit.lens._rows import grouped, mean
from lorakit.naming.roles import Role, group_of
from lorakit.spectral import LowRank, effective_rank, stable_rank
from lorakit.spectral.gram import svd_from_grams

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from lorakit.lens.training.factors import Factors
    from lorakit.lens.training.gradients import GradientWatch

Detail = Literal["summary", "roles", "modules"]


@dataclass(frozen=True)
class SnapshotModule:
    """One module's ΔW, scaling included. All numbers are None if it is not finite.

    `gradient_norm`: ‖G‖_F of the loss's gradient G with respect to the module's effective weight, in units of the loss
    passed to `backward()`. `kappa`: ‖UᵀGV‖_F / ‖G‖_F, the part of G that lies in the subspaces of ΔW (U and V are its
    singular vectors) or in those that were given, with a standard error. Both norms are estimated by random
    projections. They are None if gradients were not watched, or if G is 0, or ΔW where its subspaces count.
    `kappa_chance`: the root mean square of κ for random subspaces of the same dimensions, √(r_out r_in / (d_out d_in)).
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
    kappa_chance: float | None = None

    @property
    def group(self) -> str:
        return group_of(self.module_name)


@dataclass(frozen=True)
class SnapshotGroup:
    """The modules of one role, or all of them: means over the finite ones, None if there are none.

    `kappa` is √(Σ ‖UᵀGV‖² / Σ ‖G‖²) over the modules that have one, and `kappa_chance` its value by chance.
    """

    name: str
    modules: int
    effective_rank: float | None
    stable_rank: float | None
    capacity_utilization: float | None
    kappa: float | None
    kappa_chance: float | None = None


@dataclass(frozen=True, repr=False)
class Snapshot(Report):
    """An adapter at one training step.

    `qv_gap` is the mean capacity utilization of the query projections minus that of the value projections; None if
    the adapter lacks either. `unmeasured` names modules without a single pair of factors: grouped convolutions.
    `kappa_basis` says in which given subspaces κ was measured; None for those of ΔW, and without κ.
    """

    step: int | None
    modules: tuple[SnapshotModule, ...]
    roles: tuple[SnapshotGroup, ...]
    total: SnapshotGroup
    qv_gap: float | None
    unmeasured: tuple[str, ...] = ()
    kappa_basis: str | None = None

    @property
    def headline(self) -> str:
        step = "" if self.step is None else f"step {self.step}: "
        return f"{step}{_numbers_of(self.total)} over {self.total.modules} modules"

    @property
    def details(self) -> tuple[str, ...]:
        gap = () if self.qv_gap is None else (f"Q–V gap {self.qv_gap:+.3f}",)
        lines = tuple(f"{group.name} ({group.modules}): {_numbers_of(group)}" for group in self.roles)
        unmeasured = (f"not measured: {len(self.unmeasured)} modules",) if self.unmeasured else ()
        basis = () if self.kappa_basis is None else (f"κ in {self.kappa_basis}",)
        return (*gap, *basis, *lines, *unmeasured)

    def role(self, name: str) -> SnapshotGroup | None:
        """The group of one role; None if the adapter has no such module."""
        return next((group for group in self.roles if group.name == name), None)

    def metrics(self, detail: Detail = "summary") -> dict[str, float]:
        """Flat numbers for loggers; numbers that are None are left out.

        "summary" has ``spectral/cu``, ``spectral/qv_gap`` and ``spectral/kappa``. "roles" adds effective and stable
        rank, and each number by role, as ``spectral/cu_query``. "modules" adds each number by module, as
        ``spectral/cu/model.layers.0.self_attn.q_proj``.
        """
        found = {
            "spectral/cu": self.total.capacity_utilization,
            "spectral/qv_gap": self.qv_gap,
            "spectral/kappa": self.total.kappa,
        }
        if detail != "summary":
            for group in (self.total, *self.roles):
                ending = "" if group is self.total else f"_{group.name}"
                found |= {f"spectral/{label}{ending}": value for label, value in _labelled(group)}
        if detail == "modules":
            for module in self.modules:
                found |= {f"spectral/{label}/{module.module_name}": value for label, value in _labelled(module)}
        return {key: value for key, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without NaN and infinity; `from_dict` reads it."""
        return {
            **vars(self),
            "modules": [asdict(module) for module in self.modules],
            "roles": [asdict(group) for group in self.roles],
            "total": asdict(self.total),
            "unmeasured": list(self.unmeasured),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Snapshot:
        """The snapshot that `to_dict` turned into `plain`. Raises: ValueError for any other data."""
        try:
            return cls(
                step=plain["step"],
                modules=tuple(SnapshotModule(**row) for row in plain["modules"]),
                roles=tuple(SnapshotGroup(**group) for group in plain["roles"]),
                total=SnapshotGroup(**plain["total"]),
                qv_gap=plain["qv_gap"],
                unmeasured=tuple(plain["unmeasured"]),
                kappa_basis=plain.get("kappa_basis"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is not a snapshot of an adapter: {error!r}.") from None

    def plot(self) -> Figure:
        """Capacity utilization by layer, one line a role; modules outside numbered layers are left out."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        groups, _ = grouped(row for row in self.modules if row.layer is not None)
        for name, rows in groups.items():
            _, layers = grouped(rows)
            means = [mean(row.capacity_utilization for row in members) for members in layers.values()]
            values = [math.nan if value is None else value for value in means]
            axes.plot([int(layer) for layer in layers], values, "o-", ms=3, label=escape_mathtext(name))
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        title = "Capacity utilization by layer" + ("" if self.step is None else f", step {self.step}")
        axes.set(xlabel="layer", ylabel="capacity utilization (effective rank / r)", ylim=(0, 1.02), title=title)
        if groups:
            axes.legend(fontsize=8)
        return figure


def _numbers_of(group: SnapshotGroup) -> str:
    chance = "" if group.kappa_chance is None else f" (chance {number(group.kappa_chance)})"
    parts = [
        ("CU ", group.capacity_utilization, ""),
        ("effective rank ", group.effective_rank, ""),
        ("stable rank ", group.stable_rank, ""),
        ("κ ", group.kappa, chance),
    ]
    return ", ".join(f"{label}{number(value)}{end}" for label, value, end in parts if value is not None) or "not finite"


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
    """Measure effective rank, stable rank and capacity utilization of every module of an adapter in a model.

    The model is not changed. For DoRA and SPECLORA the low-rank part is measured. Experts stacked in one parameter are
    one row: medians of their ranks, the norm of all of them together and the largest of their spectral norms.

    Args:
        model: a PeftModel with a LORA, FISHERLORA or SPECLORA adapter, or a model with transformers' `add_adapter`. It
            may be wrapped by DistributedDataParallel or torch.compile, or sharded by fully_shard (FSDP2). If it is
            sharded, all processes must call this together; they exchange r × r Gram matrices or, if the sharding does
            not allow that, single factors. Otherwise one process can call it alone. ΔW is never formed.
        step: the step to note in the snapshot.
        gradients: the result of `lorakit.lens.watch_gradients`, for κ.
        adapter_name: which adapter to measure. Needed unless exactly one is active.
    Raises: TypeError, ValueError, UnsupportedModelError for a model without such an adapter; CalibrationError for one
    wrapped in FullyShardedDataParallel (FSDP1).

    Example:
        >>> import torch
        >>> from lorakit import lens
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> lens.snapshot(model, step=0).total.capacity_utilization  # B = 0 before training
        0.0
    """
    from lorakit.adapters.in_model import find_adapter
    from lorakit.lens.training.factors import batches, factors_of

    _, found = find_adapter(unwrapped(model), adapter_name)
    pairs = {module.name: factors_of(module) for module in found}
    factors = [one for each in pairs.values() for one in each]
    unmeasured = [name for name, each in pairs.items() if not each]
    numbers: dict[str, list[float]] = {}
    parts = [_columns(batch) for batch in batches(factors)]  # start all work on the device before waiting for any
    for names, columns in parts:
        numbers |= dict(zip(names, columns.tolist(), strict=True))
    rows = tuple(
        _row(each[0], _together([numbers[one.name] for one in each]), gradients) for each in pairs.values() if each
    )
    groups, _ = grouped(rows)
    roles = tuple(_group(name, members, gradients) for name, members in groups.items())
    utilization = {group.name: group.capacity_utilization for group in roles}
    query, value = utilization.get("query"), utilization.get("value")
    gap = None if query is None or value is None else query - value
    total = _group("all", rows, gradients)
    basis = None if gradients is None or total.kappa is None else gradients.basis
    return Snapshot(step, rows, roles, total, gap, tuple(unmeasured), basis)


def _columns(batch: Sequence[Factors]) -> tuple[list[str], Tensor]:
    """Largest singular value, stable rank and effective rank of each module: (n, 3), float64, NaN if not finite."""
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


def _together(numbers: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Norm, largest singular value, stable and effective rank of one update, or of a stack of them."""
    largest, stable, effective = zip(*numbers, strict=True)
    norm = math.hypot(*(s * math.sqrt(k) for s, k in zip(largest, stable, strict=True)))
    if not all(map(math.isfinite, (*largest, *stable, *effective))):
        return math.nan, math.nan, math.nan, math.nan
    return norm, max(largest), statistics.median(stable), statistics.median(effective)


def _row(one: Factors, numbers: tuple[float, ...], gradients: GradientWatch | None) -> SnapshotModule:
    finite = all(map(math.isfinite, numbers))
    norm, largest, stable, effective = numbers if finite else (None, None, None, None)
    name = one.module.name
    seen = None if gradients is None else gradients.overlaps.get(name)
    return SnapshotModule(
        module_name=name,
        role=one.role,
        layer=one.layer,
        rank=one.rank,
        effective_rank=effective,
        stable_rank=stable,
        capacity_utilization=None if effective is None else effective / one.rank,
        frobenius_norm=norm,
        spectral_norm=largest,
        gradient_norm=None if seen is None else seen.gradient_norm,
        kappa=None if seen is None else seen.kappa,
        kappa_stderr=None if seen is None else seen.kappa_stderr,
        kappa_chance=None if seen is None else seen.kappa_chance,
    )


def _group(name: str, rows: Sequence[SnapshotModule], gradients: GradientWatch | None) -> SnapshotGroup:
    kappa = chance = None
    watched = [] if gradients is None else [row for row in rows if row.kappa is not None]
    if gradients is not None and watched:
        overlaps = [gradients.overlaps[row.module_name] for row in watched]
        norm = math.hypot(*(one.gradient_norm for one in overlaps))
        kappa = min(1.0, math.hypot(*(one.seen_norm for one in overlaps)) / norm)
        by_chance = ((row.kappa_chance or 0.0) * (row.gradient_norm or 0.0) for row in watched)
        chance = math.hypot(*by_chance) / norm
    return SnapshotGroup(
        name=name,
        modules=len(rows),
        effective_rank=mean(row.effective_rank for row in rows),
        stable_rank=mean(row.stable_rank for row in rows),
        capacity_utilization=mean(row.capacity_utilization for row in rows),
        kappa=kappa,
        kappa_chance=chance,
    )
