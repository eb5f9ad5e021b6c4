"""What PEFT's methods need of a training loop beyond a loss and an optimizer, and what this loop cannot train.

References: PEFT's documentation of each method; Zhang et al., "AdaLoRA: Adaptive Budget Allocation for
Parameter-Efficient Fine-Tuning", ICLR 2023, whose schedules spend about a tenth of the steps at the initial ranks and
half of them at the final ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.errors import UnsupportedModelError
from lorakit.experiments._private import auxiliary_losses

_IN_EACH_BATCH = {"CPT": "input_type_mask", "MULTITASK_PROMPT_TUNING": "task_ids", "POLY": "task_ids"}


def prepared(name: str, config: Any, steps: int, *, own_loop: bool) -> Any:
    """A copy of the config for a training of so many steps.

    AdaLoRA's `total_step` becomes `steps`. Where `tinit` and `tfinal` are both 0, PEFT's defaults, they become a tenth
    and a half of the steps.
    Raises: UnsupportedModelError, naming config and method, for what lorakit's loop would train as something else,
        unless the caller's function trains (`own_loop`).
    """
    config = copy.deepcopy(config)
    kind = method_of(config)
    if kind == "ADALORA":
        _schedule_ranks(name, config, steps)
    reason = None if own_loop else _not_trained_here(config, kind, steps)
    if reason:
        raise UnsupportedModelError(f"{name!r} cannot be trained as {kind} needs: {reason}")
    return config


def method_of(config: Any) -> str:
    """The name of a config's PEFT method."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _schedule_ranks(name: str, config: Any, steps: int) -> None:
    if config.init_r <= config.target_r:
        raise UnsupportedModelError(
            f"{name!r}: `init_r` of AdaLoRA must be above `target_r`, or there is nothing to remove; got "
            f"{config.init_r} and {config.target_r}."
        )
    config.total_step = steps
    if config.tinit == config.tfinal == 0:
        config.tinit, config.tfinal = steps // 10, steps // 2 if steps > 2 else 0
    if max(config.tinit, 1) + config.tfinal >= steps:  # PEFT has no importances yet at the first step
        raise UnsupportedModelError(
            f"{name!r}: `tinit` + `tfinal` of AdaLoRA must be below `steps`; got {config.tinit} + {config.tfinal} and "
            f"{steps} steps. Leave both at 0 for a tenth and a half of the steps."
        )


def _not_trained_here(config: Any, kind: str, steps: int) -> str | None:
    if str(getattr(config, "init_lora_weights", "")).lower() == "eva":
        return (
            "PEFT initializes EVA from data after the adapter is attached. Call `initialize_lora_eva_weights` in a "
            "`train` of your own."
        )
    if kind == "XLORA":
        return "it mixes adapters that are already trained. Pass a `train` of your own."
    if getattr(config, "use_asa", False) and config.final_warmup > steps:
        return (
            f"its `final_warmup` {config.final_warmup} is after the last of {steps} steps, so that subspaces would "
            f"never be removed as `use_asa` asks. Lower it."
        )
    return None


def check_model(config: Any, model: nn.Module) -> None:
    """Raises: UnsupportedModelError for a LoRA-GA config if PEFT would silently initialize a plain LoRA instead."""
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if init == "lora_ga" and not any(hasattr(module, "_peft_loraga_grad") for module in model.modules()):
        raise UnsupportedModelError(
            "LoRA-GA is initialized from gradients that the base model must have already: call PEFT's "
            "`preprocess_loraga` on it first."
        )


def check_batch(config: Any, batch: Any) -> None:
    """Raises: UnsupportedModelError if the method needs an entry in each batch that this one lacks."""
    kind = method_of(config)
    needed = _IN_EACH_BATCH.get(kind)
    if needed and not (isinstance(batch, Mapping) and needed in batch):
        raise UnsupportedModelError(f"{kind} needs `{needed}` in each batch: let `collate_fn` add it.")


def loss_terms(model: Any, config: Any, loss: Tensor) -> Tensor:
    """The loss, and what a method adds that PEFT leaves to the training loop (KaSA, MonteCLoRA)."""
    if getattr(config, "kasa_config", None) or getattr(config, "monteclora_config", None):
        for term in auxiliary_losses(model.base_model):
            loss = loss + term
    return loss


def after_step(model: Any, step: int) -> None:
    """What a method does after an optimizer step, 1 for the first: AdaLoRA's ranks, AdaMSS's subspaces."""
    update = getattr(model.base_model, "update_and_allocate", None)
    if update is not None:
        update(step)


def removed_parameters(model: Any, config: Any) -> int:
    """Parameters of the directions that AdaLoRA has removed: they are zero, but still in the tensors."""
    pattern = getattr(config, "rank_pattern", None) if method_of(config) == "ADALORA" else None
    removed = 0
    for name, kept in (pattern or {}).items():
        path, _, adapter_name = name.partition(".lora_E.")
        layer = model.get_base_model().get_submodule(path)
        each = layer.lora_A[adapter_name].shape[1] + layer.lora_B[adapter_name].shape[0] + 1
        removed += each * (len(kept) - sum(kept))
    return removed
