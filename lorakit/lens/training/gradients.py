"""How much of the loss's gradient lies in an adapter's subspaces, seen while a training step's passes run.

κ = ‖UᵀGV‖_F / ‖G‖_F, G = Σ_t δ_t x_tᵀ being the gradient with respect to a module's weight as it is in effect, δ and x
its output gradients and inputs, U and V the singular vectors of its ΔW. G is never formed: with ΔW = scaling · B A,
UᵀGV comes from BᵀGAᵀ = Σ_t (Bᵀδ_t)(A x_t)ᵀ, and ‖G‖_F² is the mean of ‖Gω‖² over vectors ω of random signs
(Hutchinson). Both are sums over tokens, so they add up over micro-batches and processes as G does.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, gradient-subspace overlap metric.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from lorakit._distributed.fsdp import is_distributed, unwrapped
from lorakit.spectral.gram import svd_from_grams

if TYPE_CHECKING:
    from lorakit.adapters.in_model import LiveModule
    from lorakit.lens.training.factors import Factors


@dataclass(frozen=True)
class Overlap:
    """Of one module: ‖UᵀGV‖_F, an estimate of ‖G‖_F, and their ratio κ with its standard error; None where ΔW is 0."""

    seen_norm: float
    gradient_norm: float
    kappa: float | None
    kappa_stderr: float | None


@dataclass
class GradientWatch:
    """What `watch_gradients` saw: one `Overlap` for every module that a gradient reached, once the block has ended."""

    overlaps: dict[str, Overlap] = field(default_factory=dict)


@contextlib.contextmanager
def watch_gradients(
    model: nn.Module, *, projections: int = 8, seed: int = 0, adapter_name: str | None = None
) -> Iterator[GradientWatch]:
    """Watch the gradients of whatever forward and backward passes run in the block, for `lorakit.lens.snapshot`.

    Put it around one training step's passes, all its micro-batches, and end it before the optimizer's step. It costs
    two products with (r + projections) columns a token and module. ‖G‖_F² is estimated with a relative standard
    deviation of √(2 / projections) or less. Linear modules only; nothing of the passes changes, with gradient
    checkpointing, mixed precision, a loss that is scaled, and fully_shard too. In half precision the products are in
    bfloat16 where the gradients are, in float32 otherwise.

    Of several processes all must do this together, each with its part of the batch: what they see is summed.
    Modules that torch.compile has compiled do not let themselves be watched: they have no overlap.
    Raises: as `lorakit.lens.snapshot`; ValueError for `projections` below 2.
    """
    taps = GradientTaps(model, projections=projections, seed=seed, adapter_name=adapter_name)
    watch = GradientWatch()
    try:
        yield watch
    finally:
        taps.remove()
    watch.overlaps = taps.overlaps()


class GradientTaps:
    """Hooks that watch, from when this is made until `remove`."""

    def __init__(self, model: nn.Module, *, projections: int, seed: int, adapter_name: str | None) -> None:
        if isinstance(projections, bool) or not isinstance(projections, int) or projections < 2:
            raise ValueError(f"`projections` must be an integer of at least 2; got {projections!r}.")
        from lorakit.adapters.in_model import find_adapter

        _, modules = find_adapter(unwrapped(model), adapter_name)
        if is_compiled(model):
            modules = []
        self._projections = projections
        signs = _Signs(projections, seed)
        self._taps = [_Tap(module, signs) for module in modules if module.is_linear()]
        handles = [tap.module.layer.register_forward_hook(tap.see, with_kwargs=True) for tap in self._taps]
        self._removal = weakref.finalize(self, _remove, handles)  # at the latest with this, where training broke off

    def remove(self) -> None:
        """Take the hooks out."""
        self._removal()

    @torch.no_grad()
    def overlaps(self) -> dict[str, Overlap]:
        """What was seen until now, of every module that a gradient reached. Of several processes all must ask."""
        from lorakit.lens.training.factors import batches, factors_of, grams

        taps = {tap.module.name: tap for tap in self._taps}
        factors = [pair for tap in self._taps if (pair := factors_of(tap.module)) is not None]
        if factors and is_distributed():
            _sum_over_processes(self._taps, factors, self._projections)
        by_rank: dict[int, list[_Seen]] = {}
        for batch in batches(factors):
            for one, of_B, of_A in zip(batch, *grams(batch), strict=True):
                tap = taps[one.name]
                if tap.core is not None and tap.sketch is not None:
                    of_B = of_B if tap.module.scaling else torch.zeros_like(of_B)  # ΔW is 0
                    by_rank.setdefault(one.rank, []).append(_Seen(one.name, of_B, of_A, tap.core, tap.sketch))
        parts = [_numbers(seen) for seen in by_rank.values()]
        found = {}
        for seen, columns in zip(by_rank.values(), parts, strict=True):
            for name, numbers in zip((one.name for one in seen), columns.tolist(), strict=True):
                overlap = _overlap(*numbers)
                if overlap is not None:
                    found[name] = overlap
        return found


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile compiled it, or a module in it: hooks that come later are not called."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    enabled = torch.is_autocast_enabled(device_type)  # the context takes longer than what is asked here
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


class _Signs:
    """Random signs (projections, d), the same for all modules of one width and in all processes."""

    def __init__(self, projections: int, seed: int) -> None:
        self.projections, self.seed = projections, seed
        self._made: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def of(self, x: Tensor) -> Tensor:
        key = (x.shape[-1], x.device, x.dtype)
        if key not in self._made:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            shape = (self.projections, x.shape[-1])
            bits = torch.randint(2, shape, generator=generator, device=x.device, dtype=torch.int8)
            self._made[key] = (2 * bits - 1).to(x.dtype)
        return self._made[key]


class _Tap:
    """Sums BᵀGAᵀ (r, r) and (GΩ)ᵀ (projections, d_out) of one module over whatever runs."""

    def __init__(self, module: LiveModule, signs: _Signs) -> None:
        self.module, self.signs = module, signs
        self.core: Tensor | None = None
        self.sketch: Tensor | None = None

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not (isinstance(output, Tensor) and output.requires_grad and isinstance(x, Tensor) and x.ndim):
            return
        from lorakit.adapters.in_model import read_weight

        with torch.no_grad(), _no_autocast(x.device.type):
            dtype = output.dtype if output.dtype == torch.bfloat16 else torch.promote_types(output.dtype, torch.float32)
            x = x.detach().flatten(0, -2).to(dtype)
            A = read_weight(self.module.down)
            projected = x @ torch.cat([A.to(x.dtype), self.signs.of(x)]).mT
        cast(Any, output).register_hook(lambda gradient: self._receive(projected, gradient))

    @torch.no_grad()
    def _receive(self, projected: Tensor, gradient: Tensor) -> None:
        from lorakit.adapters.in_model import read_weight

        with _no_autocast(gradient.device.type):
            B = read_weight(self.module.up)
            delta = gradient.flatten(0, -2).to(projected.dtype)
            sums = projected.mT @ delta  # (G Aᵀ)ᵀ and (G Ω)ᵀ: this way round the product is faster
            sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
            core = (sums[: B.shape[1]] @ B.to(sums.dtype)).mT
        sketch = sums[B.shape[1] :]
        self.core = core if self.core is None else self.core + core
        self.sketch = sketch if self.sketch is None else self.sketch + sketch


class _Seen(NamedTuple):
    """Of one module: BᵀB, A Aᵀ, BᵀGAᵀ (r, r) and (GΩ)ᵀ (projections, d_out)."""

    name: str
    up: Tensor
    down: Tensor
    core: Tensor
    sketch: Tensor


def _numbers(seen: Sequence[_Seen]) -> Tensor:
    """‖UᵀGV‖_F, the mean of ‖Gω‖² and its standard error, and whether ΔW has any direction: (n, 4)."""
    device = seen[0].up.device
    stacks = zip(*((one.up, one.down, one.core) for one in seen), strict=True)
    of_B, of_A, cores = (torch.stack([part.to(device) for part in parts]).double() for parts in stacks)
    _, X, Y = svd_from_grams(of_B, of_A)
    overlaps = torch.linalg.matrix_norm(X.mT @ cores @ Y)
    squares = torch.stack([one.sketch.to(device).double().square().sum(1) for one in seen])  # each ‖G‖_F² on average
    spread = squares.std(1) / math.sqrt(squares.shape[1])
    return torch.stack([overlaps, squares.mean(1), spread, X.flatten(1).any(1).double()], 1)


def _overlap(seen: float, mean: float, spread: float, defined: float) -> Overlap | None:
    if not all(map(math.isfinite, (seen, mean, spread))) or mean == 0:
        return None
    norm = max(math.sqrt(mean), seen)  # G is at least as large as what is seen of it
    if not defined:
        return Overlap(0.0, norm, None, None)
    return Overlap(seen, norm, seen / norm, seen / norm * spread / (2 * mean))


def _sum_over_processes(taps: list[_Tap], factors: list[Factors], projections: int) -> None:
    """One exchange for all modules; a module that did not run in one process counts as 0 there."""
    device = factors[0].B.device
    dtype = torch.promote_types(factors[0].B.dtype, torch.float32)
    shapes = {one.name: ((one.rank, one.rank), (projections, one.B.shape[0])) for one in factors}
    pieces = []
    for tap in taps:
        core, sketch = shapes[tap.module.name]
        pieces.append(torch.zeros(core) if tap.core is None else tap.core)
        pieces.append(torch.zeros(sketch) if tap.sketch is None else tap.sketch)
    ran = torch.tensor([float(tap.core is not None) for tap in taps])
    total = torch.cat([piece.flatten().to(device, dtype) for piece in (ran, *pieces)])
    distributed.all_reduce(total)
    somewhere, *sums = torch.split(total, [len(taps), *(piece.numel() for piece in pieces)])
    for i, (tap, ran_somewhere) in enumerate(zip(taps, somewhere.tolist(), strict=True)):
        if ran_somewhere:
            tap.core, tap.sketch = (sums[2 * i + j].view(pieces[2 * i + j].shape) for j in range(2))
