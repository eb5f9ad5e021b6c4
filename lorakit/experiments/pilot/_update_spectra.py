"""The spectrum of each weight's change after a short full fine-tuning.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026: the energy curve C(r) of ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorakit._checks import check_integer, check_seed
from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report, plain
from lorakit._signals import restoring
from lorakit.allocation import Allocation, allocate
from lorakit.calibration.state import check_can_differentiate, no_inference_mode, preserved_rng, preserved_state
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._settings import Schedule, TrainSettings, check_data
from lorakit.experiments._training import batches_of, train_adapter
from lorakit.experiments.pilot._modules import linear_modules
from lorakit.naming.roles import Role, layer_of, role_of
from lorakit.spectral import energy_curve, energy_rank
from lorakit.spectral.dense import leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class UpdateSpectrum:
    """One weight's ΔW = W_after − W_before.

    `singular_values` are descending, min(d_out, d_in) of them, within 1e-8 of the largest. `energy` is C(r) for r = 1,
    2, …: the fraction of ‖ΔW‖_F² in the r leading components; all 0 if ΔW = 0. `energy_rank_90` is the smallest r with
    C(r) ≥ 0.9. `relative_norm` is ‖ΔW‖_F / ‖W_before‖_F, None for a weight of zeros.
    """

    module_name: str
    role: Role | None
    layer: int | None
    d_out: int
    d_in: int
    singular_values: tuple[float, ...]
    energy: tuple[float, ...]
    energy_rank_90: int
    relative_norm: float | None


@dataclass(frozen=True, repr=False)
class UpdateSpectra(Report):
    """The result of `update_spectra`. `train_loss` is the mean training loss of the last tenth of the steps.

    `bases` holds each module's leading singular vectors of ΔW, U (d_out, rank) and V (d_in, rank), in float32 or better
    on the CPU; they are not part of `to_dict`.
    """

    modules: tuple[UpdateSpectrum, ...]
    seed: int
    train_loss: float | None
    settings: dict[str, Any]
    rank: int
    bases: dict[str, tuple[Tensor, Tensor]] = field(compare=False)

    @property
    def headline(self) -> str:
        ranks = sorted(row.energy_rank_90 for row in self.modules)
        return (
            f"{self.settings['steps']} steps of full fine-tuning: 90% of the energy of ΔW at rank {ranks[0]} to "
            f"{ranks[-1]}, median {ranks[len(ranks) // 2]}, in {len(ranks)} modules"
        )

    @property
    def details(self) -> tuple[str, ...]:
        rows = sorted(self.modules, key=lambda row: -row.energy_rank_90 / len(row.singular_values))[:5]
        return tuple(f"{row.module_name}: 90% at {row.energy_rank_90} of {len(row.singular_values)}" for row in rows)

    @property
    def description(self) -> str:
        """Which subspaces `bases` are; records of κ name them so."""
        steps = "1 step" if self.settings["steps"] == 1 else f"{self.settings['steps']} steps"
        return f"leading subspaces of rank {self.rank} of ΔW after {steps} of full fine-tuning (seed {self.seed})"

    @property
    def spectra(self) -> dict[str, tuple[float, ...]]:
        """Singular values by module: the `scores` of `lorakit.allocation.allocate` for the rule "energy"."""
        return {row.module_name: row.singular_values for row in self.modules}

    @property
    def costs(self) -> dict[str, int]:
        """Parameters of one unit of rank by module, d_in + d_out: the `costs` of `lorakit.allocation.allocate`."""
        return {row.module_name: row.d_in + row.d_out for row in self.modules}

    def allocate(self, budget: int, **options: Any) -> Allocation:
        """Ranks under a budget of parameters, by the energy of ΔW; options are those of `allocation.allocate`."""
        roles = {row.module_name: row.role for row in self.modules}
        return allocate(self.spectra, self.costs, budget, **{"rule": "energy", "roles": roles, **options})

    def to_dict(self) -> dict[str, Any]:
        summary = {name: getattr(self, name) for name in ("seed", "train_loss", "settings", "rank")}
        return {"modules": [plain(vars(row)) for row in self.modules], "summary": plain(summary)}

    def rows(self) -> list[dict[str, Any]]:
        """One row a module."""
        return [
            {
                "module_name": row.module_name,
                "role": row.role,
                "layer": row.layer,
                "d_out": row.d_out,
                "d_in": row.d_in,
                "energy_rank_90": row.energy_rank_90,
                "relative_norm": row.relative_norm,
            }
            for row in self.modules
        ]

    def plot(self) -> Figure:
        """C(r) of every module."""
        figure = new_figure(8, 5)
        axes = figure.subplots()
        for row in self.modules:
            axes.plot(range(1, len(row.energy) + 1), row.energy, color="C0", lw=0.8, alpha=0.5)
        axes.axhline(0.9, color="0.7", lw=0.8)
        axes.set(xlabel="components kept r", ylabel="fraction of ‖ΔW‖_F² kept, C(r)", ylim=(0, 1.02), xscale="log")
        axes.set_title(escape_mathtext(f"ΔW after {self.settings['steps']} steps of full fine-tuning"))
        return figure


def update_spectra(
    model: nn.Module,
    train_data: Any,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    modules: Sequence[str] | None = None,
    rank: int = 16,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: Schedule = "cosine",
    group_by_length: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> UpdateSpectra:
    """Train all of a model's parameters for a few steps, and measure the spectrum of each linear weight's change.

    AdamW, as in `lorakit.experiments.rank_sweep`; gradients and moments take three times the model's size, and a copy
    of the weights on the CPU once more. Afterwards the model is as it was, bit for bit.

    Args:
        model: a base model without adapters, in float32 or float64. In half precision small steps round to nothing.
        modules: names of the linear modules to measure; all but the output layer unless given.
        rank: how many leading singular vectors of each ΔW are kept in `bases`; less where d_out or d_in is below it.

    All other arguments are those of `lorakit.experiments.rank_sweep`.

    Raises: UnsupportedModelError for a model with adapters, or whose parameters are not float32 or float64; ValueError
    and TypeError for arguments that are not allowed; CalibrationError if the model returns no loss, or one that is not
    finite.
    """
    chosen = linear_modules(model, modules)
    check_data(train_data)
    check_seed("seed", seed)
    check_integer("rank", rank)
    settings = TrainSettings(
        steps, batch_size, learning_rate, weight_decay, warmup_steps, schedule, collate_fn, None, group_by_length
    )
    narrow = [name for name, p in model.named_parameters() if p.dtype not in (torch.float32, torch.float64)]
    if narrow:
        raise UnsupportedModelError(
            f"`model` must be in float32 or float64, since its own weights are trained; {narrow[0]!r} is not. Load it "
            "with dtype=torch.float32."
        )
    check_can_differentiate(model)
    with (
        no_inference_mode(),
        _preserved(model) as before,
        tqdm(total=steps, desc="full fine-tuning", unit="step", disable=not progress, delay=1.0) as bar,
    ):
        model.requires_grad_(True)
        loss = train_adapter(model, batches_of(train_data, settings, seed, bar), settings, seed, "the full fine-tuning")
        rows, bases = [], {}
        for name, module in chosen.items():
            row, bases[name] = _spectrum(name, module.weight, before[cast(nn.Parameter, module.weight)], rank)
            rows.append(row)
    return UpdateSpectra(tuple(rows), seed, loss, settings.record(train_data), rank, bases)


@restoring
def _preserved(model: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Restore a model that is trained in full; yields each parameter's values before."""
    with preserved_state(model), preserved_rng(model), preserved_base(model, None):
        before = {parameter: parameter.detach().to("cpu", copy=True) for parameter in model.parameters()}
        try:
            yield before
        finally:
            with torch.no_grad():
                for parameter, values in before.items():
                    parameter.copy_(values)


@torch.no_grad()
def _spectrum(name: str, weight: Tensor, before: Tensor, rank: int) -> tuple[UpdateSpectrum, tuple[Tensor, Tensor]]:
    old = before.to(weight.device)
    change = weight.double() - old.double()
    sigma, vectors, left = leading(change)
    near = vectors[:, :rank]
    far = torch.linalg.qr((change.mT if left else change) @ near).Q
    basis = tuple(part.to("cpu", weight.dtype) for part in ((near, far) if left else (far, near)))
    norm, change_norm = torch.stack([torch.linalg.matrix_norm(old.double()), torch.linalg.matrix_norm(change)]).tolist()
    row = UpdateSpectrum(
        module_name=name,
        role=role_of(name),
        layer=layer_of(name),
        d_out=weight.shape[0],
        d_in=weight.shape[1],
        singular_values=tuple(sigma.tolist()),
        energy=tuple(energy_curve(sigma).tolist()),
        energy_rank_90=int(energy_rank(sigma, 0.9)),
        relative_norm=change_norm / norm if norm else None,
    )
    return row, (basis[0], basis[1])
