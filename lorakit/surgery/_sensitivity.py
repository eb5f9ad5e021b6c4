"""How much each example's loss changes with each singular value of an adapter's update.

g_k = u_kᵀ (∂ℓ/∂ΔW) v_k = Σ_tokens (u_k · δ_t)(v_k · x_t), Eq. 4 of "Spectral Surgery" (Tian et al., 2026): the
derivative of an example's own mean loss with respect to σ_k. It is read off a pass in which the adapter's two factors
are stood in for by Vh and U, with σ between them as the only thing that takes a gradient, one copy an example.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._distributed.fsdp import full_tensor, is_sharded, unwrapped
from lorakit.adapters.in_model import LiveModule, live_modules, resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.run import collect
from lorakit.calibration.state import activated
from lorakit.calibration.tally import Collected
from lorakit.errors import CalibrationError, SurgeryError, UnsupportedModelError
from lorakit.naming.roles import RESIDUAL_WRITING
from lorakit.surgery._policies import AGGREGATES, Aggregate
from lorakit.surgery._report import SensitivityReport, SensitivityRow


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapted module with the thin SVD of its update, m = min(r, d_out, d_in) components."""

    module: LiveModule
    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """The modules with their per-example sensitivities (n, m), and what the pass counted."""

    modules: list[Decomposed]
    per_example: list[Tensor]
    zero_modules: list[str]
    idle_modules: list[str]
    collected: Collected
    adapter_name: str


class _Down(nn.Module):
    """Stands in for lora_A: v_k · x for each token, times σ_k."""

    def __init__(self, Vh: Tensor, singular_values: Tensor) -> None:
        super().__init__()
        self.weight = Vh
        self.singular_values = singular_values
        self.one_example = False
        self.copies: list[Tensor] = []
        self.separable = True
        self.ran_without_grad = False

    def forward(self, x: Tensor) -> Tensor:
        projected = F.linear(x, self.weight)
        if not torch.is_grad_enabled():
            self.ran_without_grad = True
            return projected * self.singular_values.to(projected.dtype)
        n = 1 if self.one_example or x.ndim == 1 else x.shape[0]
        copy = self.singular_values.repeat(n, 1).requires_grad_()
        self.copies.append(copy)
        if not self.one_example:
            # Tokens of one example must share the first index. Two dimensions may be tokens of all examples in a row,
            # and equal leading ones may be time first: neither is certain.
            self.separable &= n == 1 or (x.ndim >= 3 and x.shape[1] != n)
        return projected * copy.view(n, *[1] * (projected.ndim - 2), -1).to(projected.dtype)

    def begin(self, *, one_example: bool) -> None:
        self.one_example = one_example
        self.copies = []
        self.separable = True
        self.ran_without_grad = False

    def collect(self, num_examples: int) -> Tensor | None:
        if self.ran_without_grad and not self.copies:
            raise CalibrationError(
                "An adapted module ran without gradients, so its sensitivity cannot be measured. If the model uses "
                "reentrant gradient checkpointing, switch it to use_reentrant=False."
            )
        copies, self.copies = self.copies, []
        if not self.separable or any(copy.shape[0] != num_examples for copy in copies):
            return None
        grads = [copy.grad for copy in copies if copy.grad is not None]
        if not grads:
            return self.singular_values.new_zeros(num_examples, self.singular_values.shape[0])
        return torch.stack(grads).sum(0)


class _Up(nn.Module):
    """Stands in for lora_B: U over the scaling that the layer applies after it, with the adapter's bias."""

    def __init__(self, U: Tensor, scaling: float, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = U / scaling
        self.bias = bias

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.weight, self.bias)


def measure(
    adapter: PeftModel,
    calib_loader: Iterable[Any],
    *,
    target_modules: str | Sequence[str] | None,
    num_examples: int,
    loss_fn: LossFn | None,
    adapter_name: str | None,
    progress: bool,
) -> Measured:
    """Decompose the selected modules and collect each example's sensitivities; the model ends as it began."""
    adapter = unwrapped(adapter)
    adapter_name = resolve_adapter_name(adapter, adapter_name)
    selected = select_modules(adapter, adapter_name, target_modules)
    _check_layers(adapter, adapter_name, selected)
    decomposed, zero = [], []
    for module in selected:
        U, S, Vh = module.factors().svd()
        if module.scaling == 0 or not S.any():
            zero.append(module.name)
        else:
            decomposed.append(Decomposed(module, U, S, Vh))
    if not decomposed:
        warnings.warn(
            f"The update of each of the {len(zero)} selected modules is zero (an untrained adapter has B = 0): there "
            f"are no singular components to weigh.",
            stacklevel=3,
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(activated(adapter, adapter_name))
        probes = [stack.enter_context(_standing_in(item)) for item in decomposed]
        collected = collect(
            adapter,
            calib_loader,
            probes,
            num_examples=num_examples,
            loss_fn=loss_fn,
            progress=progress,
            description="sensitivity",
        )
    alive = [bool(statistic.any()) for statistic in collected.statistics]
    return Measured(
        modules=[item for item, lives in zip(decomposed, alive, strict=True) if lives],
        per_example=[g for g, lives in zip(collected.statistics, alive, strict=True) if lives],
        zero_modules=zero,
        idle_modules=[item.module.name for item, lives in zip(decomposed, alive, strict=True) if not lives],
        collected=collected,
        adapter_name=adapter_name,
    )


def sensitivity(
    adapter: PeftModel,
    calib_loader: Iterable[Any],
    *,
    target_modules: str | Sequence[str] | None = None,
    aggregate: Aggregate = "mean_abs",
    num_examples: int = 128,
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Measure ∂ℓ/∂σ_k of every singular component of an adapter's update, and change nothing.

    Args:
        adapter: a PeftModel with a LORA, FISHERLORA or SPECLORA adapter (of SPECLORA, the low-rank part).
        calib_loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes.
        target_modules: names, matched as PEFT matches its own `target_modules` (a string is a regular expression, but
            "all-linear" is every linear module the adapter has); None selects what writes to the residual stream.
        aggregate: over the examples, ``mean_abs`` (mean of |g|), ``mean`` (signed) or ``abs_mean`` (|mean of g|).
        num_examples: how many examples to use; fewer are used where the loader has fewer.
        loss_fn: ``loss_fn(model, batch)`` returns the losses (n,) of a batch's examples.
        adapter_name: which adapter; needed where not exactly one is active.
        progress: show a progress bar on stderr.

    Each example's sensitivities belong to its own mean loss, whatever the batch size, the order and the padding.
    Among several processes a loader prepared by accelerate, or with a DistributedSampler, gives each of them the result
    of one process with the whole loader (see `lorakit.calibration.collect`); any other must give each the same batches.

    Raises: ValueError or TypeError subclasses of lorakit's where the adapter, the modules or the data are unfit; what
    the loader, the model and `loss_fn` raise passes through. The model is left as it was.
    """
    check_aggregate(aggregate)
    measured = measure(
        adapter,
        calib_loader,
        target_modules=target_modules,
        num_examples=num_examples,
        loss_fn=loss_fn,
        adapter_name=adapter_name,
        progress=progress,
    )
    rows = [
        SensitivityRow(
            module_name=item.module.name,
            role=item.module.role,
            rank=item.module.rank,
            scaling=item.module.scaling,
            singular_values=item.S.double().tolist(),
            sensitivity=aggregate_examples(per_example, aggregate).tolist(),
            per_example=per_example,
        )
        for item, per_example in zip(measured.modules, measured.per_example, strict=True)
    ]
    return SensitivityReport(
        adapter_name=measured.adapter_name,
        aggregate=aggregate,
        num_examples=measured.collected.num_examples,
        num_without_labels=measured.collected.num_without_labels,
        zero_modules=measured.zero_modules,
        idle_modules=measured.idle_modules,
        modules=rows,
    )


def aggregate_examples(per_example: Tensor, aggregate: Aggregate) -> Tensor:
    """Per-example sensitivities (n, m) to one per component (m,), in float64 on the CPU."""
    g = per_example.detach().to("cpu", torch.float64)
    if aggregate == "mean":
        return g.mean(0)
    return g.abs().mean(0) if aggregate == "mean_abs" else g.mean(0).abs()


def check_aggregate(aggregate: str) -> None:
    if aggregate not in AGGREGATES:
        raise ValueError(f"`aggregate` must be one of {', '.join(AGGREGATES)}; got {aggregate!r}.")


def select_modules(
    adapter: PeftModel, adapter_name: str, target_modules: str | Sequence[str] | None
) -> list[LiveModule]:
    """The adapted modules meant by `target_modules`; never none.

    Raises: UnsupportedModelError where what is selected is no linear module; SurgeryError where nothing is.
    """
    available = live_modules(adapter, adapter_name)
    if target_modules is None:
        chosen = [module for module in available if module.is_linear() and module.role in RESIDUAL_WRITING]
    elif target_modules == "all-linear":
        chosen = [module for module in available if module.is_linear()]
    elif isinstance(target_modules, str):
        chosen = [module for module in available if re.fullmatch(target_modules, module.name)]
    else:
        wanted = list(target_modules)
        ends = tuple(f".{name}" for name in wanted)
        chosen = [module for module in available if module.name in wanted or module.name.endswith(ends)]
    if not chosen:
        leaves = sorted({module.name.rpartition(".")[2] for module in available})
        asked = (
            "no module that writes to the residual stream (the default)"
            if target_modules is None
            else f"nothing that matches target_modules={target_modules!r}"
        )
        raise SurgeryError(
            f"Adapter {adapter_name!r} has {asked}. It adapts {len(available)} modules named {leaves}; pass some of "
            f"these names as `target_modules`."
        )
    unfit = [module for module in chosen if not module.is_linear()]
    if unfit:
        raise UnsupportedModelError(
            f"Surgery edits linear modules; {unfit[0].name!r} is a {type(unfit[0].layer).__name__} layer. Leave it out "
            f"of `target_modules`."
        )
    return chosen


def _check_layers(adapter: PeftModel, adapter_name: str, modules: list[LiveModule]) -> None:
    for module in modules:
        layer = module.layer
        if layer.merged:
            raise SurgeryError(
                f"Adapters {layer.merged_adapters} are merged into {module.name!r}, where their components can no "
                f"longer be told from the weight. Call unmerge_adapter() first."
            )
        if layer.use_dora.get(adapter_name) or adapter_name in layer.lora_variant:
            variant = "DoRA" if layer.use_dora.get(adapter_name) else type(layer.lora_variant[adapter_name]).__name__
            raise UnsupportedModelError(
                f"{module.name!r} uses {variant}, whose update is not the product of its two factors alone; surgery "
                f"edits plain low-rank updates."
            )
        if layer.disable_adapters:
            raise SurgeryError(f"The adapters of {module.name!r} are disabled; enable them first.")
    owners: dict[tuple[bool, int], set[str]] = {}
    for module in live_modules(adapter, adapter_name):
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            factor = getattr(module.layer, name)
            if adapter_name in factor:
                weight = getattr(factor[adapter_name], "weight", factor[adapter_name])
                if not weight.is_meta:
                    sharded = is_sharded(weight)
                    place = sharded, id(weight) if sharded else weight.data_ptr()
                    owners.setdefault(place, set()).add(module.name)
    for module in modules:
        for others in owners.values():
            if module.name in others and len(others) > 1:
                raise UnsupportedModelError(
                    f"The modules {sorted(others)} share factors (tied adapters); editing one would edit the others."
                )


@contextlib.contextmanager
def _standing_in(item: Decomposed) -> Iterator[_Down]:
    """Put the decomposition in the place of a module's factors for the time of a pass."""
    layer, name = item.module.layer, item.module.adapter_name
    down, up = layer.lora_A[name], layer.lora_B[name]
    bias = getattr(up, "bias", None)
    if bias is not None and bias.is_meta:
        raise UnsupportedModelError(f"{item.module.name!r} has an offloaded `lora_bias`, which surgery does not read.")
    probe = _Down(item.Vh, item.S)
    try:
        layer.lora_A[name] = probe
        layer.lora_B[name] = _Up(item.U, item.module.scaling, None if bias is None else full_tensor(bias.detach()))
        yield probe
    finally:
        layer.lora_A[name] = down
        layer.lora_B[name] = up
