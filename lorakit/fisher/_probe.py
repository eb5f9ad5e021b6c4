"""How steep the loss is in each adapted module: the diagonal empirical Fisher information of its lora_B.

F = E_i[(∂ℓ_i/∂B)²], the mean over examples of squared per-example gradients ("LoRA-Lens", section 3.2), ℓ_i being
example i's own mean loss. At each lora_B, with input a (T, r) and output gradient δ (T, d_out) of one example, that
gradient is δᵀ a: so one forward and backward of a batch, with every parameter frozen, gives those of all its examples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lorakit._distributed.fsdp import unwrapped
from lorakit.adapters.in_model import LiveModule, live_modules, resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.run import collect
from lorakit.calibration.state import activated
from lorakit.errors import UnsupportedModelError
from lorakit.fisher._gradient_probe import LoraBGradientProbe, probed
from lorakit.fisher._report import FisherReport, FisherRow, Moments, estimate
from lorakit.fisher._temporary_lora import temporary_lora, train_temporary_lora
from lorakit.naming.roles import layer_of, role_of

if TYPE_CHECKING:
    pass

FACTORS = ("B", "A", "weight")
LEARNING_RATE = 2e-4
# On a CPU short examples gain from being run together, while the matrices are small; from some hundred tokens on there
# is nothing left to gain, and the logits of a large vocabulary take the more memory. On an accelerator a batch is run
# as it comes.
CPU_TOKENS = 384


def probe(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    target_modules: str | Sequence[str] | None = None,
    num_examples: int = 16,
    seed: int = 0,
    factors: Sequence[str] = ("B",),
    loss_fn: LossFn | None = None,
    train_loader: Iterable[Any] | None = None,
    train_steps: int = 50,
    learning_rate: float = LEARNING_RATE,
    adapter_name: str | None = None,
    progress: bool = True,
) -> FisherReport:
    """Measure the diagonal empirical Fisher information of every adapted module's lora_B, and change nothing.

    Args:
        model: a base model, which gets a temporary LoRA (r = 16, scaling 2, lora_A drawn from `seed`, lora_B = 0) and
            loses it again; or a PeftModel with a LORA, FISHERLORA or SPECLORA adapter, at any point of its training.
        loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes.
        target_modules: matched as PEFT matches its own. None is the query and value projections of a base model, and
            every linear module that the adapter of a PeftModel has.
        num_examples: how many examples to use; fewer are used where the loader has fewer.
        factors: what besides "B" to measure: "A" is lora_A (zero while lora_B is); "weight" the dense weight W, whose
            per-example gradient G = δᵀ x (d_out, d_in) is never formed. Its row sums Σ_j G_oj² are
            Σ_ts δ_to δ_so (x_t · x_s), and its column sums Σ_o G_oj² are Σ_ts x_tj x_sj (δ_t · δ_s): they come from the
            T × T Gram matrices of x and of δ, exact, with no Kronecker factors taken to be independent.
        loss_fn: ``loss_fn(model, batch)`` returns the losses (n,) of a batch's examples.
        train_loader: of a base model only: first train the temporary LoRA on its batches (over and over if need be) for
            `train_steps` steps of AdamW at `learning_rate` (2e-4, no weight decay, gradients clipped to norm 1), as in
            the paper's probe after about 50 steps. In eval mode, so that nothing of the base changes.
        adapter_name: which adapter of a PeftModel; needed where not exactly one is active.
        progress: show a progress bar on stderr.

    Each example's gradients belong to its own mean loss, whatever the batch size, the order and the padding. On the CPU
    large batches are run in parts. Several processes: see `lorakit.calibration.collect`.

    Raises: ValueError or TypeError subclasses of lorakit's where the model, the modules or the data are unfit; what the
    loader, the model and `loss_fn` raise passes through. Either way the model, its flags, its adapters and the random
    number generators are as they were.
    Reference: "LoRA-Lens", sections 3.2 and 4.
    """
    wanted = set(factors) | {"B"}
    if not wanted <= set(FACTORS):
        raise ValueError(f"`factors` must be among {', '.join(FACTORS)}; got {list(factors)!r}.")
    if isinstance(train_steps, bool) or not isinstance(train_steps, int) or train_steps < 1:
        raise ValueError(f"`train_steps` must be a positive integer; got {train_steps!r}.")
    model = unwrapped(model)
    temporary = not isinstance(model, PeftModel)
    if not temporary and train_loader is not None:
        raise ValueError(
            "`train_loader` trains a temporary LoRA on a base model; a PeftModel has an adapter of its own."
        )
    if temporary and adapter_name is not None:
        raise ValueError(f"`adapter_name` is for a PeftModel; the model is a {type(model).__name__}.")
    unprobed: list[str] = []
    with contextlib.ExitStack() as stack:
        if temporary:
            modules = stack.enter_context(temporary_lora(model, target_modules, seed))
            if train_loader is not None:
                train_temporary_lora(model, modules, train_loader, loss_fn, train_steps, learning_rate, progress)
        else:
            adapter_name = resolve_adapter_name(cast(PeftModel, model), adapter_name)
            modules, unprobed = _select(cast(PeftModel, model), adapter_name, target_modules, wanted)
            stack.enter_context(activated(cast(PeftModel, model), adapter_name))
        targets = _target_names(model, [module.name for module in modules])
        taps = [stack.enter_context(probed(module, wanted)) for module in modules]
        collected = collect(
            model,
            loader,
            taps,
            num_examples=num_examples,
            loss_fn=loss_fn,
            progress=progress,
            description="Fisher information",
            max_tokens=CPU_TOKENS if next(model.parameters()).device.type == "cpu" else math.inf,
        )
        results = [
            _row(module, tap, statistic)
            for module, tap, statistic in zip(modules, taps, collected.statistics, strict=True)
        ]
    return FisherReport(
        modules=tuple(row for row, _ in results),
        target_modules=targets,
        num_examples=collected.num_examples,
        num_without_labels=collected.num_without_labels,
        temporary=temporary,
        train_steps=train_steps if train_loader is not None else 0,
        seed=seed,
        unprobed=tuple(unprobed),
        moments={row.module_name: moments for row, moments in results},
    )


def _select(
    model: PeftModel, adapter_name: str, target_modules: str | Sequence[str] | None, factors: set[str]
) -> tuple[list[LiveModule], list[str]]:
    """The adapter's linear modules that are meant, and the names of those meant that are none."""
    available = live_modules(model, adapter_name)
    chosen = available
    if target_modules is not None and target_modules != "all-linear":
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(target_modules=targets)
        chosen = [module for module in available if check_target_module_exists(config, module.name)]
    modules = [module for module in chosen if module.is_linear()]
    if not modules:
        leaves = sorted({module.name.rpartition(".")[2] for module in available})
        raise UnsupportedModelError(
            f"Adapter {adapter_name!r} has no linear module that matches target_modules={target_modules!r}. It adapts "
            f"{len(available)} modules named {leaves}; pass some of these names as `target_modules`."
        )
    for module in modules:
        layer = module.layer
        if layer.merged:
            raise UnsupportedModelError(
                f"Adapters {layer.merged_adapters} are merged into {module.name!r}, so that its lora_B takes no "
                f"part in the forward pass. Call unmerge_adapter() first."
            )
        if "weight" in factors and module.scaling == 0:
            raise UnsupportedModelError(
                f"The adapter of {module.name!r} is scaled to 0, so that nothing reaches its output's gradient; leave "
                f"'weight' out of `factors`, or set the scale back."
            )
        if layer.disable_adapters:
            raise UnsupportedModelError(f"The adapters of {module.name!r} are disabled; enable them first.")
        if layer.use_dora.get(adapter_name) or adapter_name in layer.lora_variant:
            raise UnsupportedModelError(
                f"{module.name!r} uses a variant of LoRA (DoRA or another), whose lora_B is more than a factor; the "
                f"probe measures plain low-rank updates. Probe the base model instead."
            )
    return modules, [module.name for module in chosen if not module.is_linear()]


def _target_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The shortest `target_modules` that mean these modules and no others."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    leaves = {name.rpartition(".")[2] for name in names}
    found = {name for name, _ in cast(nn.Module, base).named_modules() if name.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves)) if found == set(names) else tuple(names)


def _row(module: LiveModule, tap: LoraBGradientProbe, statistic: Tensor) -> tuple[FisherRow, Moments]:
    """A module's row from the roots of the examples' mean squares (n, k)."""
    squares = statistic.detach().to("cpu", torch.float64) ** 2
    d_out, rank = tap.weight.shape
    widths = [1, *([1] if "A" in tap.factors else []), *([d_out, tap.d_in] if "weight" in tap.factors else [])]
    parts = list(torch.split(squares, widths, dim=1))
    per_example = parts.pop(0).squeeze(1)
    a = estimate(parts.pop(0).squeeze(1)) if "A" in tap.factors else None
    rows, columns = parts if parts else (None, None)
    weight = None if rows is None else estimate(rows.sum(1) / (d_out * tap.d_in))
    found = estimate(per_example)
    row = FisherRow(
        module_name=module.name,
        role=role_of(module.name),
        layer=layer_of(module.name),
        d_out=d_out,
        d_in=tap.d_in,
        rank=rank,
        scaling=module.scaling,
        params=rank * (d_out + tap.d_in),
        fisher=found.value,
        stderr=found.stderr,
        factor_a=a,
        weight=weight,
    )
    mean_rows, mean_columns = (None if value is None else value.mean(0) for value in (rows, columns))
    return row, Moments(per_example, mean_rows, mean_columns)
