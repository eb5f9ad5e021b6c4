"""How much of the loss's gradient lies in an adapter's subspaces, watched while a training step runs.

κ = ‖UᵀGV‖_F / ‖G‖_F. G = Σ_t δ_t x_tᵀ is the gradient with respect to a module's effective weight; δ and x are its
output gradients and inputs; U and V are the singular vectors of its ΔW. G is never formed. With ΔW = scaling · B A,
UᵀGV follows from BᵀGAᵀ = Σ_t (Bᵀδ_t)(A x_t)ᵀ, of whose factors a LoRA layer has both at hand, and ‖G‖_F² is the mean
of ‖Gω‖² over random sign vectors ω (Hutchinson). Both are sums over tokens, so they add up over micro-batches and
processes as G does. With U and V given, UᵀGV = Σ_t (Uᵀδ_t)(Vᵀx_t)ᵀ.

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

from lorakit._checks import check_integer
from lorakit._distributed.fsdp import is_distributed, unwrapped
from lorakit._signals import restoring
from lorakit.lens._private import is_compiled
from lorakit.lens.training.basis import Basis, FixedBasis
from lorakit.spectral.gram import svd_from_grams

if TYPE_CHECKING:
    from lorakit.adapters.in_model import LiveModule
    from lorakit.lens.training.factors import Factors


@dataclass(frozen=True)
class Overlap:
    """One module's ‖UᵀGV‖_F (`seen_norm`), an estimate of ‖G‖_F, and their ratio κ with its standard error.

    `kappa_chance`: the root mean square of κ for random subspaces of the same dimensions. It, `kappa` and
    `kappa_stderr` are None if U and V are those of a ΔW that is 0.
    """

    seen_norm: float
    gradient_norm: float
    kappa: float | None
    kappa_stderr: float | None
    kappa_chance: float | None = None


@dataclass
class GradientWatch:
    """The result of `watch_gradients`: an `Overlap` for every module that a gradient reached, filled at block end.

    `basis` says which subspaces were given; None for those of ΔW.
    """

    overlaps: dict[str, Overlap] = field(default_factory=dict)
    basis: str | None = None


@restoring
def watch_gradients(
    model: nn.Module,
    *,
    projections: int = 8,
    basis: Basis | None = None,
    seed: int = 0,
    adapter_name: str | None = None,
) -> Iterator[GradientWatch]:
    """Watch the gradients of all forward and backward passes in the block, for `lorakit.lens.snapshot`.

    Put the block around all micro-batches of one training step, and end it before the optimizer's step. It costs two
    products with `projections` columns per token and module, the first of which modules with one input share; with r
    more where a layer does more than LoRA's plain step (dropout, DoRA) and in float16. ‖G‖_F² is estimated with a
    relative standard deviation of at most √(2 / projections).

    Only linear modules are watched. The passes themselves do not change, also under gradient checkpointing, mixed
    precision, loss scaling and fully_shard. bfloat16 gradients are multiplied in bfloat16, all others in float32 or
    better. With several processes, all must call this together, each with its part of the batch; the sums are taken
    over processes. Modules that torch.compile has compiled have no overlap.

    With `basis`, U and V are given, not those of ΔW: a report of `gradient_subspaces` or `update_spectra` of
    `lorakit.experiments.pilot`, or a mapping from module names to U (d_out, q) and V (d_in, q) with orthonormal
    columns. All linear modules of the adapter need them. That costs two products with q + `projections` columns, and
    as much memory on the model's device as an adapter of rank q.

    Raises: what `lorakit.lens.snapshot` raises; ValueError for `projections` below 2; TypeError and ValueError, naming
    the modules, for a `basis` that does not fit the adapter or is not orthonormal.

    Example:
        >>> import torch
        >>> from lorakit import lens
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> _ = torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
        >>> with lens.watch_gradients(model) as gradients:
        ...     model(torch.ones(3, 6)).sum().backward()
        >>> 0 < gradients.overlaps["0"].kappa <= 1
        True
    """
    from lorakit.adapters.in_model import find_adapter

    given = None if basis is None else FixedBasis(basis)
    if given is not None:
        given.check(model, find_adapter(unwrapped(model), adapter_name)[1])
    probes = GradientProbes(model, projections=projections, seed=seed, adapter_name=adapter_name, basis=given)
    watch = GradientWatch(basis=None if given is None else given.description)
    try:
        yield watch
    finally:
        probes.remove()
    watch.overlaps = probes.overlaps()


class GradientProbes:
    """Hooks on a model's adapted linear modules that sum what κ needs, until `remove`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        projections: int,
        seed: int,
        adapter_name: str | None,
        basis: FixedBasis | None = None,
    ) -> None:
        check_integer("projections", projections, least=2)
        from lorakit.adapters.in_model import find_adapter

        _, modules = find_adapter(unwrapped(model), adapter_name)
        if is_compiled(model):
            modules = []
        self._projections, self._basis = projections, basis
        signs = _Signs(projections, seed)
        self._probes = [_Probe(module, signs, basis) for module in modules if module.is_linear()]
        handles = [handle for probe in self._probes for handle in probe.hooks()]
        self._removal = weakref.finalize(self, _remove, handles)  # also if training was interrupted

    def remove(self) -> None:
        """Remove the hooks."""
        self._removal()

    @torch.no_grad()
    def overlaps(self) -> dict[str, Overlap]:
        """Overlaps so far, of every module that a gradient reached. With several processes all must call this."""
        from lorakit.lens.training.factors import factors_of

        probes = {probe.module.name: probe for probe in self._probes}
        factors = [pair for probe in self._probes for pair in factors_of(probe.module)]
        if factors and is_distributed():
            _sum_over_processes(self._probes, factors, self._projections)
        by_dimension: dict[int, list[_Seen]] = {}
        for one, of_U, of_V in _spans(factors, self._basis):
            probe = probes[one.name]
            if probe.core is not None and probe.sketch is not None:
                chance = _chance(len(of_U), one.B.shape[0], one.A.shape[1])
                seen = _Seen(one.name, chance, of_U, of_V, probe.core, probe.sketch)
                by_dimension.setdefault(len(of_U), []).append(seen)
        parts = [_numbers(group) for group in by_dimension.values()]
        found = {}
        for group, columns in zip(by_dimension.values(), parts, strict=True):
            for seen, numbers in zip(group, columns.tolist(), strict=True):
                overlap = _overlap(seen.chance, *numbers)
                if overlap is not None:
                    found[seen.name] = overlap
        return found


def _spans(factors: Sequence[Factors], basis: FixedBasis | None) -> Iterator[tuple[Factors, Tensor, Tensor]]:
    """Each module's factors, and the Gram matrices of what spans the subspaces: U and V if given, else B and Aᵀ."""
    from lorakit.lens.training.factors import batches, grams

    if basis is not None:
        yield from ((one, *basis.grams(one.name)) for one in factors)
        return
    for batch in batches(factors):
        for one, of_B, of_A in zip(batch, *grams(batch), strict=True):
            yield one, of_B if one.module.scaling else torch.zeros_like(of_B), of_A  # ΔW is 0


def _chance(dimension: int, d_out: int, d_in: int) -> float:
    """√(E‖UᵀGV‖² / ‖G‖²) for a fixed G and random U (d_out, dimension) and V (d_in, dimension)."""
    return math.sqrt(min(dimension, d_out) * min(dimension, d_in) / (d_out * d_in))


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    enabled = torch.is_autocast_enabled(device_type)  # asking is faster than entering the context
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


class _Signs:
    """Random signs (projections, d), equal for all modules of one width and in all processes."""

    def __init__(self, projections: int, seed: int) -> None:
        self.projections, self.seed = projections, seed
        self._made: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def of(self, x: Tensor) -> Tensor:
        key = (x.shape[-1], x.device, x.dtype)
        if key not in self._made:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            shape = (self.projections, x.shape[-1])
            bits = torch.randint(2, shape, generator=generator, device=x.device, dtype=torch.int8)
            self._made[key] = (2 * bits - 1).to(x.dtype)
        return self._made[key]

    def products(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(tokens, projections): the tokens' products with the signs, made once for modules that have one input."""
        if self._last is not None:
            of, version, found = self._last
            if of() is x and version == x._version and found.dtype == dtype:
                return found
        flat = _tokens(x, dtype)
        found = flat @ self.of(flat).mT
        self._last = (weakref.ref(x), x._version, found)
        return found


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).to(dtype)  # in a hook, einops takes longer than the product


class _Probe:
    """Sums one module's BᵀGAᵀ (r, r), or UᵀGV (q, q) if given, and (GΩ)ᵀ (projections, d_out) over all passes.

    A plain LoRA layer computes A x itself, and its gradient is scaling · Bᵀδ; they are taken from there where they are
    exactly that, and computed elsewhere.
    """

    def __init__(self, module: LiveModule, signs: _Signs, basis: FixedBasis | None) -> None:
        self.module, self.signs, self.basis = module, signs, basis
        self.core: Tensor | None = None
        self.sketch: Tensor | None = None
        self._hidden: Tensor | None = None  # what A gave in the pass that is running

    def hooks(self) -> list[RemovableHandle]:
        layer, down = self.module.layer, self.module.down
        if self.basis is not None:
            return [layer.register_forward_hook(self._see, with_kwargs=True)]
        return [down.register_forward_hook(self._keep), layer.register_forward_hook(self._see, with_kwargs=True)]

    def _keep(self, down: nn.Module, args: Any, output: Any) -> None:
        self._hidden = output if isinstance(output, Tensor) else None

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, self._hidden = self._hidden, None
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not (isinstance(output, Tensor) and output.requires_grad and isinstance(x, Tensor) and x.ndim):
            return
        with torch.no_grad(), _no_autocast(x.device.type):
            dtype = output.dtype if output.dtype == torch.bfloat16 else torch.promote_types(output.dtype, torch.float32)
            if hidden is not None and self._is_plain(hidden, x):
                kept, projected = hidden.detach(), self.signs.products(x, dtype)
                cast(Any, hidden).register_hook(lambda gradient: self._receive_hidden(kept, gradient))
            else:
                flat = _tokens(x, dtype)
                projected = flat @ torch.cat([self._right(flat), self.signs.of(flat)]).mT
        cast(Any, output).register_hook(lambda gradient: self._receive(projected, gradient))

    def _right(self, like: Tensor) -> Tensor:
        """A (r, d_in), or Vᵀ (q, d_in)."""
        from lorakit.adapters.in_model import read_weight

        if self.basis is not None:
            return self.basis.right(self.module.name, like).mT
        return read_weight(self.module.down).to(like.dtype)

    def _left(self, like: Tensor) -> Tensor:
        """B (d_out, r), or U (d_out, q)."""
        from lorakit.adapters.in_model import read_weight

        if self.basis is not None:
            return self.basis.left(self.module.name, like)
        return read_weight(self.module.up).to(like.dtype)

    def _is_plain(self, hidden: Tensor, x: Tensor) -> bool:
        """Whether `hidden` is A x of all tokens of x, and the layer adds scaling · B A x and nothing else of it."""
        name, layer = self.module.adapter_name, cast(Any, self.module.layer)
        dropout = layer.lora_dropout[name]
        return (
            name not in getattr(layer, "lora_variant", {})
            and (isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0)
            and hidden.shape[:-1] == x.shape[:-1]
            and hidden.requires_grad
            and hidden.dtype != torch.float16  # in which Bᵀδ may vanish
            and self.module.scaling != 0
        )

    @torch.no_grad()
    def _receive_hidden(self, hidden: Tensor, gradient: Tensor) -> None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with _no_autocast(gradient.device.type):
            self._add_core(_tokens(gradient, dtype).mT @ _tokens(hidden, dtype) / self.module.scaling)

    @torch.no_grad()
    def _receive(self, projected: Tensor, gradient: Tensor) -> None:
        with _no_autocast(gradient.device.type):
            delta = _tokens(gradient, projected.dtype)
            sums = projected.mT @ delta  # (G Aᵀ)ᵀ or (G V)ᵀ, unless it comes from elsewhere, and (G Ω)ᵀ
            sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
            rank = len(sums) - self.signs.projections
            if rank:
                self._add_core((sums[:rank] @ self._left(sums)).mT)
        sketch = sums[rank:]
        self.sketch = sketch if self.sketch is None else self.sketch + sketch

    def _add_core(self, core: Tensor) -> None:
        self.core = core if self.core is None else self.core + core


class _Seen(NamedTuple):
    """One module's κ by chance, BᵀB, A Aᵀ and BᵀGAᵀ (r, r), or UᵀU, VᵀV and UᵀGV, and (GΩ)ᵀ (projections, d_out)."""

    name: str
    chance: float
    up: Tensor
    down: Tensor
    core: Tensor
    sketch: Tensor


def _numbers(seen: Sequence[_Seen]) -> Tensor:
    """‖UᵀGV‖_F, the mean of ‖Gω‖², its standard error, and whether ΔW is not 0: (n, 4), float64."""
    device = seen[0].core.device
    stacks = zip(*((one.up, one.down, one.core) for one in seen), strict=True)
    of_B, of_A, cores = (torch.stack([part.to(device) for part in parts]).double() for parts in stacks)
    _, X, Y = svd_from_grams(of_B, of_A)
    overlaps = torch.linalg.matrix_norm(X.mT @ cores @ Y)
    squares = torch.stack([one.sketch.to(device).double().square().sum(1) for one in seen])  # each ‖G‖_F² on average
    spread = squares.std(1) / math.sqrt(squares.shape[1])
    return torch.stack([overlaps, squares.mean(1), spread, X.flatten(1).any(1).double()], 1)


def _overlap(chance: float, seen: float, mean: float, spread: float, defined: float) -> Overlap | None:
    if not all(map(math.isfinite, (seen, mean, spread))) or mean == 0:
        return None
    norm = max(math.sqrt(mean), seen)  # the norm of a projection is at most that of G
    if not defined:
        return Overlap(0.0, norm, None, None)
    return Overlap(seen, norm, seen / norm, seen / norm * spread / (2 * mean), chance)


def _sum_over_processes(probes: list[_Probe], factors: list[Factors], projections: int) -> None:
    """Sum over processes, in one exchange for all modules. A module that a process did not run counts as 0."""
    device = factors[0].B.device
    dtype = torch.promote_types(factors[0].B.dtype, torch.float32)
    of_B = {one.name: one.B for one in factors}
    pieces = []
    for probe in probes:
        d_out, r = of_B[probe.module.name].shape
        width = r if probe.basis is None else len(probe.basis.grams(probe.module.name)[0])
        core, sketch = (width, width), (projections, d_out)
        pieces.append(torch.zeros(core) if probe.core is None else probe.core)
        pieces.append(torch.zeros(sketch) if probe.sketch is None else probe.sketch)
    ran = torch.tensor([float(probe.core is not None) for probe in probes])
    total = torch.cat([piece.flatten().to(device, dtype) for piece in (ran, *pieces)])
    distributed.all_reduce(total)
    somewhere, *sums = torch.split(total, [len(probes), *(piece.numel() for piece in pieces)])
    for i, (probe, ran_somewhere) in enumerate(zip(probes, somewhere.tolist(), strict=True)):
        if ran_somewhere:
            probe.core, probe.sketch = (sums[2 * i + j].view(pieces[2 * i + j].shape) for j in range(2))
