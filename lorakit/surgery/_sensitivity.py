"""How much each example's loss changes with each singular value of an adapter's update.

g_k = u_kᵀ (∂ℓ/∂ΔW) v_k = Σ_tokens (u_k · δ_t)(v_k · x_t), Eq. 4 of "Spectral Surgery" (Tian et al., 2026), is the
derivative of an example's own mean loss with respect to σ_k. A pass with U, σ and Vh in place of the factors gives it
for all examples of a batch: one copy of σ per example is all that takes a gradient.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor

from lorakit._checks import check_integer
from lorakit._signals import all_of
from lorakit.adapters.in_model import LiveModule, resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.run import collect
from lorakit.calibration.state import activated, base_model_of, check_can_differentiate, no_inference_mode
from lorakit.calibration.tally import Collected
from lorakit.data._loader import examples_for
from lorakit.evaluation import LoadOptions
from lorakit.surgery._live import live
from lorakit.surgery._policies import AGGREGATES, Aggregate
from lorakit.surgery._report import SensitivityReport, SensitivityRow
from lorakit.surgery._select import check_layers, select_modules
from lorakit.surgery._singular_value_probe import Decomposed, decompose, probed


@dataclass(frozen=True, eq=False)
class Measured:
    """The decomposed modules with their per-example sensitivities (n, m), and what the pass counted."""

    model_name: str
    adapter_name: str
    modules: list[Decomposed]
    per_example: list[Tensor]
    zero_modules: list[str]
    idle_modules: list[str]
    collected: Collected


def measure(
    adapter: PeftModel,
    loader: Any,
    *,
    target_modules: str | Sequence[str] | None,
    num_examples: int,
    loss_fn: LossFn | None,
    adapter_name: str | None,
    progress: bool,
    tokenizer: Any = None,
) -> Measured:
    """Decompose the selected modules and measure each example's sensitivities; the model does not change."""
    check_integer("num_examples", num_examples)
    adapter_name = resolve_adapter_name(adapter, adapter_name)
    check_can_differentiate(adapter)
    selected = select_modules(adapter, adapter_name, target_modules)
    check_layers(adapter, adapter_name, selected)
    loader = examples_for(adapter, loader, tokenizer, num_examples=num_examples, progress=progress)
    decomposed, zero = _decomposed(selected)
    with activated(adapter, adapter_name), all_of(map(probed, decomposed)) as probes:
        collected = collect(
            adapter,
            loader,
            probes,
            num_examples=num_examples,
            loss_fn=loss_fn,
            progress=progress,
            description="sensitivity",
        )
    return _measured(adapter, adapter_name, (decomposed, zero), collected)


def measured_before(
    adapter: PeftModel, adapter_name: str, target_modules: Sequence[str], collected: Collected
) -> Measured:
    """What `measure` returned when its pass found `collected` on the same adapter and modules."""
    selected = select_modules(adapter, adapter_name, target_modules)
    check_layers(adapter, adapter_name, selected)
    return _measured(adapter, adapter_name, _decomposed(selected), collected)


def _decomposed(selected: Sequence[LiveModule]) -> tuple[list[Decomposed], list[str]]:
    """The modules that have an update, decomposed, and the names of those that have none."""
    decomposed = [decompose(module) for module in selected]
    zero = [item.module.name for item in decomposed if item.module.scaling == 0 or not item.S.any()]
    decomposed = [item for item in decomposed if item.module.name not in zero]
    if not decomposed:
        warnings.warn(
            f"The updates of all {len(zero)} selected modules are zero, as those of an untrained adapter are (B = 0): "
            f"there are no singular components to weigh.",
            stacklevel=5,
        )
    return decomposed, zero


def _measured(
    adapter: PeftModel, adapter_name: str, modules: tuple[list[Decomposed], list[str]], collected: Collected
) -> Measured:
    decomposed, zero = modules
    matters = [bool(statistic.any()) for statistic in collected.statistics]
    base = base_model_of(adapter)
    return Measured(
        model_name=getattr(base, "name_or_path", "") or type(base).__name__,
        adapter_name=adapter_name,
        modules=[item for item, matter in zip(decomposed, matters, strict=True) if matter],
        per_example=[g for g, matter in zip(collected.statistics, matters, strict=True) if matter],
        zero_modules=zero,
        idle_modules=[item.module.name for item, matter in zip(decomposed, matters, strict=True) if not matter],
        collected=collected,
    )


@no_inference_mode()
def sensitivity(
    adapter: PeftModel | str | os.PathLike[str],
    loader: Any,
    *,
    target_modules: str | Sequence[str] | None = None,
    aggregate: Aggregate = "mean_abs",
    num_examples: int = 128,
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    base: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Measure ∂ℓ/∂σ_k of every singular component of an adapter's update; the model does not change.

    Args:
        adapter: a PeftModel with a LORA, FISHERLORA or SPECLORA adapter (the low-rank part of SPECLORA), or with `base`
            the directory or Hub id of such an adapter.
        loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes; or a path, a
            dataset id or a `datasets.Dataset`, which is read as `lorakit.data.loader` does by default.
        target_modules: names, matched as PEFT matches its own `target_modules`: a list of names or name endings, a
            regular expression, or "all-linear" for every linear module of the adapter. None selects the modules that
            write to the residual stream (output and down projections).
        aggregate: over examples: ``mean_abs`` (mean of |g|), ``mean`` (signed) or ``abs_mean`` (|mean of g|).
        num_examples: how many examples to use; all of them if the loader has fewer.
        loss_fn: ``loss_fn(model, batch)`` returns the loss of each example, (n,).
        adapter_name: which adapter; required unless exactly one is active.
        tokenizer: with a path, dataset id or Dataset: a tokenizer, or the path of the adapter beside which it lies.
            None: the one beside an adapter on disk, or else the one that the base model was saved with.
        base, options: for an adapter on disk, the path or Hub id of its base model, and how that is loaded.
        progress: show a progress bar on stderr.

    Each example's sensitivities belong to its own mean loss, whatever the batch size, order and padding. For several
    processes see `lorakit.calibration.collect`.

    Raises: subclasses of ValueError and TypeError from lorakit.errors for unsuitable adapters, modules or data. Errors
    of the loader, the model and `loss_fn` pass through. The model is always restored.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(base, config)
        >>> loss_fn = lambda model, batch: model(batch).square().mean((1, 2))
        >>> batches = [torch.randn(4, 5, 8) for _ in range(2)]
        >>> report = sensitivity(model, batches, target_modules=["0"], loss_fn=loss_fn, progress=False)
        >>> [(row.module_name, len(row.sensitivity)) for row in report.modules]
        [('0', 2)]
    """
    check_aggregate(aggregate)
    given = live(adapter, base, options, tokenizer)
    measured = measure(
        given.model,
        loader,
        target_modules=target_modules,
        num_examples=num_examples,
        loss_fn=loss_fn,
        adapter_name=adapter_name,
        progress=progress,
        tokenizer=given.tokenizer_of(loader),
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
        model_name=measured.model_name,
        adapter_name=measured.adapter_name,
        aggregate=aggregate,
        num_examples=measured.collected.num_examples,
        num_without_labels=measured.collected.num_without_labels,
        zero_modules=measured.zero_modules,
        idle_modules=measured.idle_modules,
        modules=rows,
    )


def aggregate_examples(per_example: Tensor, aggregate: Aggregate) -> Tensor:
    """Per-example sensitivities (n, m) reduced to one per component (m,), in float64 on the CPU."""
    g = per_example.detach().double().cpu()
    if aggregate == "mean":
        return g.mean(0)
    return g.abs().mean(0) if aggregate == "mean_abs" else g.mean(0).abs()


def check_aggregate(aggregate: str) -> None:
    """Raises: ValueError for an unknown aggregate."""
    if aggregate not in AGGREGATES:
        raise ValueError(f"`aggregate` must be one of {', '.join(AGGREGATES)}; got {aggregate!r}.")
