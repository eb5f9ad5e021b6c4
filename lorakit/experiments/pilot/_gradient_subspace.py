"""The leading subspace of each weight's accumulated gradient, from a sketch that grows batch by batch.

G = Σ_t δ_t x_tᵀ over all tokens t of all batches is never formed. Two fixed Gaussian test matrices Ω (d_in, l) and
Ψ (d_out, m) give the sums GΩ = Σ δ_t (Ωᵀx_t)ᵀ and ΨᵀG = Σ (Ψᵀδ_t) x_tᵀ, with l = rank + oversampling and m = 2l + 1.
With Q an orthonormal basis of GΩ, G is close to Q (ΨᵀQ)⁺ ΨᵀG.

Reference: Tropp, Yurtsever, Udell & Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIAM
Journal on Matrix Analysis and Applications 38, 2017, algorithm 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorakit._checks import check_integer, check_seed
from lorakit._format import share
from lorakit._report import Report
from lorakit.calibration.state import check_can_differentiate, no_inference_mode, preserved_rng, preserved_state
from lorakit.experiments.pilot._batches import PilotLoss, batch_loss, check_finite, pilot_batches
from lorakit.experiments.pilot._modules import linear_modules
from lorakit.naming.roles import Role, layer_of, role_of


@dataclass(frozen=True)
class GradientSketch:
    """One weight's accumulated gradient G = Σ over batches of ∂loss/∂W.

    `singular_values` are estimates of G's `rank` leading ones. `norm` is an estimate of ‖G‖_F, with a relative standard
    deviation of at most 1/√(2l); `captured` estimates the fraction of ‖G‖_F² that the subspace holds, at most 1; None
    if G = 0.
    """

    module_name: str
    role: Role | None
    layer: int | None
    singular_values: tuple[float, ...]
    norm: float
    captured: float | None


@dataclass(frozen=True, repr=False)
class GradientSubspaces(Report):
    """The result of `gradient_subspaces`. `bases` holds U (d_out, rank) and V (d_in, rank) of each module.

    They are orthonormal, in float32 or better, on the CPU; they are not part of `to_dict`.
    """

    modules: tuple[GradientSketch, ...]
    rank: int
    oversampling: int
    num_batches: int
    seed: int
    bases: dict[str, tuple[Tensor, Tensor]] = field(compare=False)

    @property
    def headline(self) -> str:
        shares = sorted(row.captured for row in self.modules if row.captured is not None)
        if not shares:
            return f"no gradient reached any of {len(self.modules)} modules in {self.num_batches} batches"
        return (
            f"{self.rank} directions hold {share(shares[0])} to {share(shares[-1])} of the accumulated gradient's "
            f"energy, median {share(shares[len(shares) // 2])}, in {len(shares)} modules ({self.num_batches} batches)"
        )

    @property
    def description(self) -> str:
        """Which subspaces these are; records of κ name them so."""
        batches = "1 batch" if self.num_batches == 1 else f"{self.num_batches} batches"
        return f"gradient subspaces of rank {self.rank} ({batches}, seed {self.seed})"

    def to_dict(self) -> dict[str, Any]:
        rows = [{**vars(row), "singular_values": list(row.singular_values)} for row in self.modules]
        summary = {name: getattr(self, name) for name in ("rank", "oversampling", "num_batches", "seed")}
        return {"modules": rows, "summary": summary}


def gradient_subspaces(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int,
    rank: int = 16,
    oversampling: int = 8,
    modules: Sequence[str] | None = None,
    loss_fn: PilotLoss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GradientSubspaces:
    """Sketch the leading subspace of each linear weight's gradient, summed over batches. Nothing is trained.

    Between batches, a module keeps (d_out + 2 d_in + …) × about rank + oversampling numbers, never d_out × d_in. The
    model is in eval mode, and as it was afterwards.

    Args:
        model: a base model without adapters.
        loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes.
        num_batches: how many batches of `loader` are used, at most.
        rank: the dimension of the subspaces; less in modules with d_out or d_in below it.
        oversampling: further directions of the sketch; more of them make it more exact.
        modules: names of linear modules; all but the output layer unless given.
        loss_fn: ``loss_fn(model, batch)`` returns the loss of a batch; the model's own unless given.
        seed: of the test matrices.

    Raises: ValueError and TypeError for arguments that are not allowed; UnsupportedModelError for a model with
    adapters; CalibrationError for an empty loader and for losses or gradients that are missing or not finite.
    """
    chosen = linear_modules(model, modules)
    check_integer("rank", rank)
    check_integer("oversampling", oversampling, least=2)
    check_seed("seed", seed)
    check_can_differentiate(model)
    count = 0
    with no_inference_mode(), preserved_state(model), preserved_rng(model), ExitStack() as hooks:
        model.eval().requires_grad_(False)
        sketches = {
            name: _Sketch(module, rank + oversampling, seed + number)
            for number, (name, module) in enumerate(chosen.items())
        }
        for name, module in chosen.items():
            handle = module.register_forward_hook(sketches[name].see)
            hooks.callback(handle.remove)
        bar = tqdm(total=num_batches, desc="gradient sketch", unit="batch", disable=not progress, delay=1.0)
        for batch in pilot_batches(model, loader, num_batches):
            with torch.enable_grad():
                loss = batch_loss(model, batch, loss_fn)
                torch.autograd.backward(loss)
            count += 1
            bar.update()
        bar.close()
    rows, bases = [], {}
    for name, sketch in sketches.items():
        row, bases[name] = _row(name, sketch, rank)
        rows.append(row)
    return GradientSubspaces(tuple(rows), rank, oversampling, count, seed, bases)


class _Sketch:
    """GΩ (d_out, l) and ΨᵀG (m, d_in) of one module, summed over passes."""

    def __init__(self, module: nn.Linear, width: int, seed: int) -> None:
        weight = module.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        width = min(width, *weight.shape)

        def normal(d: int, columns: int) -> Tensor:
            return torch.randn(d, columns, generator=generator, dtype=torch.float64).to(weight.device, self.dtype)

        self.of_input = normal(module.in_features, width)
        self.of_output = normal(module.out_features, min(2 * width + 1, module.out_features))
        self.range = torch.zeros(module.out_features, width, device=weight.device, dtype=self.dtype)
        self.corange = torch.zeros(self.of_output.shape[1], module.in_features, device=weight.device, dtype=self.dtype)

    def see(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = cast(Tensor, args[0]).detach()
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # no weight above it is differentiated
        cast(Any, output).register_hook(lambda gradient: self._add(x, gradient))
        return output

    @torch.no_grad()
    def _add(self, x: Tensor, gradient: Tensor) -> None:
        inputs = x.reshape(-1, x.shape[-1]).to(self.dtype)
        deltas = gradient.reshape(-1, gradient.shape[-1]).to(self.dtype)
        self.range += deltas.mT @ (inputs @ self.of_input)
        self.corange += (deltas @ self.of_output).mT @ inputs


@torch.no_grad()
def _row(name: str, sketch: _Sketch, rank: int) -> tuple[GradientSketch, tuple[Tensor, Tensor]]:
    check_finite(sketch.range, f"The gradient of {name!r}")
    range_, corange = sketch.range.double(), sketch.corange.double()
    Q, _ = torch.linalg.qr(range_)
    core = torch.linalg.pinv(sketch.of_output.double().mT @ Q) @ corange
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    squared = range_.square().sum() / range_.shape[1]  # E‖Gω‖² = ‖G‖_F²
    squared, found = torch.stack([squared, S[:rank].square().sum()]).tolist()
    row = GradientSketch(
        module_name=name,
        role=role_of(name),
        layer=layer_of(name),
        singular_values=tuple(S[:rank].tolist()),
        norm=math.sqrt(squared),
        captured=min(1.0, found / squared) if squared else None,
    )
    basis = (Q @ U)[:, :rank], Vh[:rank].mT
    return row, (basis[0].to(sketch.dtype).cpu(), basis[1].to(sketch.dtype).cpu())
