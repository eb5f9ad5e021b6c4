"""How sensitive the loss is to each adapted module: the diagonal empirical Fisher information of its lora_B.

F = E_i[(∂ℓ_i/∂B)²] is the mean over examples of squared per-example gradients ("LoRA-Lens", section 3.2), where ℓ_i is
example i's own mean loss. If a lora_B has input a (T, r) and output gradient δ (T, d_out) for one example, then that
example's gradient is δᵀ a. So one forward and backward pass of a batch, with every parameter frozen, gives the
gradients of all its examples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lorakit._checks import check_integer, check_seed
from lorakit._distributed.fsdp import unwrapped
from lorakit._signals import all_of, restoring
from lorakit.adapters.in_model import LiveModule, check_no_stacks, live_modules, resolve_adapter_name
from lorakit.calibration.losses import LossFn
from lorakit.calibration.run import collect
from lorakit.calibration.state import activated, base_model_of, check_can_differentiate, no_inference_mode
from lorakit.data._loader import examples_for
from lorakit.data._sources import is_source
from lorakit.errors import UnsupportedModelError
from lorakit.fisher._gradient_probe import LoraBGradientProbe, probed
from lorakit.fisher._mask_ladder import MaskLadder, oriented_weight
from lorakit.fisher._report import FisherReport, FisherRow, MaskStep, Moments, estimate
from lorakit.fisher._temporary_lora import temporary_lora, train_temporary_lora
from lorakit.naming.roles import layer_of, role_of
from lorakit.tuners._mask import MODES, Mode

FACTORS = ("B", "A", "weight")
Method = Literal["fisherlora", "speclora"]
LADDER = (1, *range(25, 401, 25))  # up to twice the paper's k; 1 is the smallest mask there is
LEARNING_RATE = 2e-4
# On a CPU, running short examples together is faster while the matrices are small. From some hundred tokens on nothing
# is gained, and the logits of a large vocabulary take more memory. An accelerator runs batches as they come.
CPU_TOKENS = 384


@no_inference_mode()
def probe(
    model: nn.Module,
    loader: Any,
    *,
    target_modules: str | Sequence[str] | None = None,
    num_examples: int = 16,
    seed: int = 0,
    factors: Sequence[str] = ("B",),
    loss_fn: LossFn | None = None,
    train_loader: Any = None,
    train_steps: int = 50,
    learning_rate: float = LEARNING_RATE,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    method: Method = "fisherlora",
    mode: Mode = "hadamard",
    ladder: Sequence[int] = LADDER,
) -> FisherReport:
    """Measure the diagonal empirical Fisher information of every adapted module's lora_B; the model does not change.

    With ``method="speclora"`` the same pass also measures SpecLoRA's mask: S(k) = Σ_{i≤k} E[(∂ℓ/∂d_i)²], for each k of
    a ladder.

    Args:
        model: a base model, which gets a temporary LoRA (r = 16, scaling 2, lora_A drawn from `seed`, lora_B = 0); or
            a PeftModel with a LORA, FISHERLORA or SPECLORA adapter, at any point of its training.
        loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes; or a path, a
            dataset id or a `datasets.Dataset`, which is read as `lorakit.data.loader` does by default.
        target_modules: matched as PEFT matches its own. None selects the query and value projections of a base model,
            and every linear module of a PeftModel's adapter.
        num_examples: how many examples to use; all of them if the loader has fewer.
        factors: what to measure besides "B": "A" is lora_A (its gradient is 0 while lora_B is); "weight" is the dense
            weight W. Its per-example gradient G = δᵀ x (d_out, d_in) is never formed: the row sums Σ_j G_oj² are
            Σ_ts δ_to δ_so (x_t · x_s), and the column sums Σ_o G_oj² are Σ_ts x_tj x_sj (δ_t · δ_s). Both come from
            T × T Gram matrices and are exact; no Kronecker factors are assumed to be independent.
        loss_fn: ``loss_fn(model, batch)`` returns the loss of each example, (n,).
        train_loader: for a base model only: first train the temporary LoRA on these batches, or this source, repeated
            as needed, for `train_steps` steps of AdamW at `learning_rate` (no weight decay, gradients clipped to norm
            1), like the paper's probe after about 50 steps. The base stays frozen and in eval mode.
        adapter_name: which adapter of a PeftModel; required unless exactly one is active.
        tokenizer: with a path, dataset id or Dataset: a tokenizer, or the path of the adapter or model beside which it
            lies. None: the one that the base model was saved with.
        progress: show a progress bar on stderr.
        method: "fisherlora", or "speclora" for S(k) besides; `lorakit.SpecLoRAConfig.from_probe` turns that into ks.
        mode: what a mask of SpecLoRA's would rescale; see `lorakit.SpecLoRAConfig`. The svd modes need one full SVD a
            module.
        ladder: the ks to measure, clipped to the smaller side of each weight; by default 1, and 25 to 400 in steps of
            25. The memory of a module grows with examples × ladder × largest k.

    Each example's gradients belong to its own mean loss, whatever the batch size, order and padding. On a CPU, large
    batches run in parts. For several processes see `lorakit.calibration.collect`.

    Raises: subclasses of ValueError and TypeError from lorakit.errors for unsuitable models, modules or data. Errors of
    the loader, the model and `loss_fn` pass through. The model, its flags, its adapters and the random number
    generators are always restored.
    Reference: "LoRA-Lens", sections 3.2 and 4.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return self.q_proj(x).tanh() * self.v_proj(x)
        >>> loss_fn = lambda model, batch: model(batch).square().mean((1, 2))
        >>> batches = [torch.randn(4, 5, 8) for _ in range(2)]
        >>> report = probe(Model(), batches, loss_fn=loss_fn, progress=False)
        >>> [(row.module_name, row.fisher > 0) for row in report.modules]
        [('q_proj', True), ('v_proj', True)]
    """
    wanted = _check_choices(factors, method, mode, ladder)
    masks = method == "speclora"
    check_integer("num_examples", num_examples)
    check_integer("train_steps", train_steps)
    seed = check_seed("seed", seed)
    model = unwrapped(model)
    check_can_differentiate(model)
    _check_kind(model, train_loader, adapter_name)
    loader, train_loader = _batches(model, loader, train_loader, tokenizer, num_examples, progress)
    needed = {*wanted, "weight"} if masks else wanted
    attached, unprobed = _attached(model, adapter_name, target_modules, needed, seed)
    with attached as modules:
        if train_loader is not None:
            train_temporary_lora(model, modules, train_loader, loss_fn, train_steps, learning_rate, progress)
        targets = _target_names(model, [module.name for module in modules])
        ladders = [_mask_ladder(module, mode, ladder) if masks else None for module in modules]
        with all_of(probed(module, wanted, steps) for module, steps in zip(modules, ladders, strict=True)) as probes:
            collected = collect(
                model,
                loader,
                probes,
                num_examples=num_examples,
                loss_fn=loss_fn,
                progress=progress,
                description="Fisher information",
                max_tokens=CPU_TOKENS if next(model.parameters()).device.type == "cpu" else math.inf,
            )
        rows = list(map(_row, modules, probes, collected.statistics))
    return FisherReport(
        model_name=_name_of(base_model_of(model)),
        modules=tuple(row for row, _ in rows),
        target_modules=targets,
        num_examples=collected.num_examples,
        num_without_labels=collected.num_without_labels,
        temporary=not isinstance(model, PeftModel),
        train_steps=train_steps if train_loader is not None else 0,
        seed=seed,
        mode=mode if masks else None,
        unprobed=tuple(unprobed),
        moments={row.module_name: moments for row, moments in rows},
    )


def _check_choices(factors: Sequence[str], method: str, mode: str, ladder: Sequence[int]) -> set[str]:
    """The factors to measure. Raises: ValueError for an argument that is not one of its choices."""
    wanted = set(factors) | {"B"}
    if not wanted <= set(FACTORS):
        raise ValueError(f"`factors` must be among {', '.join(FACTORS)}; got {list(factors)!r}.")
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {', '.join(get_args(Method))}; got {method!r}.")
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}; got {mode!r}.")
    if not ladder:
        raise ValueError("`ladder` must have at least one k; got none.")
    for k in ladder:
        check_integer("ladder", k)
    return wanted


def _batches(
    model: nn.Module, loader: Any, train_loader: Any, tokenizer: Any, num_examples: int, progress: bool
) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """Both loaders, made from sources where they are; a `tokenizer` must be for one of them."""
    for_loader = tokenizer if is_source(loader) or not is_source(train_loader) else None
    batches = examples_for(model, loader, for_loader, num_examples=num_examples, progress=progress)
    if train_loader is None:
        return batches, None
    for_training = tokenizer if is_source(train_loader) else None
    return batches, examples_for(model, train_loader, for_training, progress=progress)


def _check_kind(model: nn.Module, train_loader: Any, adapter_name: str | None) -> None:
    """Raises: ValueError for an argument that is for the other kind of model."""
    if train_loader is not None and isinstance(model, PeftModel):
        raise ValueError("`train_loader` trains the temporary LoRA of a base model; a PeftModel is probed as it is.")
    if adapter_name is not None and not isinstance(model, PeftModel):
        raise ValueError(f"`adapter_name` is for a PeftModel; the model is a {type(model).__name__}.")


def _attached(
    model: nn.Module,
    adapter_name: str | None,
    target_modules: str | Sequence[str] | None,
    factors: set[str],
    seed: int,
) -> tuple[contextlib.AbstractContextManager[list[LiveModule]], list[str]]:
    """What attaches a LoRA, or activates an adapter, for as long as it is probed; names of what cannot be probed."""
    if not isinstance(model, PeftModel):
        return temporary_lora(model, target_modules, seed), []
    name = resolve_adapter_name(model, adapter_name)
    chosen = _chosen(model, name, target_modules, factors)
    return _active(model, name, chosen), [module.name for module in chosen if not module.is_linear()]


def _chosen(
    model: PeftModel, adapter_name: str, target_modules: str | Sequence[str] | None, factors: set[str]
) -> list[LiveModule]:
    """An adapter's selected modules, of which at least one is linear. Raises: UnsupportedModelError."""
    available = live_modules(model, adapter_name)
    chosen = available
    if target_modules is not None and target_modules != "all-linear":
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(target_modules=targets)
        chosen = [module for module in available if check_target_module_exists(config, module.name)]
        check_no_stacks(chosen, "The probe")
    modules = [module for module in chosen if module.is_linear()]
    if not modules:
        leaves = sorted({module.name.rpartition(".")[2] for module in available})
        raise UnsupportedModelError(
            f"Adapter {adapter_name!r} has no linear module that matches target_modules={target_modules!r}. It adapts "
            f"{len(available)} modules named {leaves}; pass some of these names as `target_modules`."
        )
    for module in modules:
        _check_layer(module, factors)
    return chosen


@restoring
def _active(model: PeftModel, adapter_name: str, chosen: Sequence[LiveModule]) -> Iterator[list[LiveModule]]:
    """Activate an adapter; its linear modules among those chosen."""
    with activated(model, adapter_name):
        yield [module for module in chosen if module.is_linear()]


def _name_of(base: nn.Module) -> str:
    return str(getattr(base, "name_or_path", "") or type(base).__name__)


def _check_layer(module: LiveModule, factors: set[str]) -> None:
    """Raises: UnsupportedModelError if the module's lora_B does not take part in the forward pass as a plain factor."""
    layer, adapter_name = module.layer, module.adapter_name
    if layer.merged:
        raise UnsupportedModelError(
            f"Adapters {layer.merged_adapters} are merged into {module.name!r}, so its lora_B takes no part in the "
            f"forward pass. Call unmerge_adapter() first."
        )
    if "weight" in factors and module.scaling == 0:
        raise UnsupportedModelError(
            f"The adapter's scaling at {module.name!r} is 0, so the gradient of the weight cannot be seen through it. "
            f"Restore the scaling, or leave out what needs that gradient: 'weight' in `factors`, method='speclora'."
        )
    if layer.disable_adapters:
        raise UnsupportedModelError(f"The adapters of {module.name!r} are disabled. Enable them first.")
    if layer.use_dora.get(adapter_name) or adapter_name in layer.lora_variant:
        raise UnsupportedModelError(
            f"{module.name!r} uses a variant of LoRA (DoRA or another), in which lora_B is more than a factor. The "
            f"probe measures plain low-rank updates; probe the base model instead."
        )


def _target_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The shortest `target_modules` that match these modules and no others."""
    leaves = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in base_model_of(model).named_modules() if name.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves)) if matched == set(names) else tuple(names)


def _row(module: LiveModule, probe: LoraBGradientProbe, statistic: Tensor) -> tuple[FisherRow, Moments]:
    """A module's row from its probe's statistic (n, k)."""
    squares = statistic.detach().to("cpu", torch.float64) ** 2
    d_out, rank = probe.weight.shape
    B, A, rows, columns, steps = torch.split(squares, list(probe.widths), dim=1)
    per_example = B.squeeze(1)
    factor_a = estimate(A.squeeze(1)) if "A" in probe.factors else None
    dense = "weight" in probe.factors
    weight = estimate(rows.sum(1) / (d_out * probe.d_in)) if dense else None
    mask = () if probe.ladder is None else tuple(map(_mask_step, probe.ladder.ks, steps.T))
    fisher = estimate(per_example)
    row = FisherRow(
        module_name=module.name,
        role=role_of(module.name),
        layer=layer_of(module.name),
        d_out=d_out,
        d_in=probe.d_in,
        rank=rank,
        scaling=module.scaling,
        params=rank * (d_out + probe.d_in),
        fisher=fisher.value,
        stderr=fisher.stderr,
        factor_a=factor_a,
        weight=weight,
        mask=mask,
    )
    mean_rows, mean_columns = (value.mean(0) if dense else None for value in (rows, columns))
    return row, Moments(per_example, mean_rows, mean_columns)


def _mask_step(k: int, per_example: Tensor) -> MaskStep:
    found = estimate(per_example)
    return MaskStep(k, found.value, found.stderr)


def _mask_ladder(module: LiveModule, mode: Mode, ladder: Sequence[int]) -> MaskLadder:
    return MaskLadder(oriented_weight(module.layer, module.name), mode, ladder)
