"""The temporary LoRA that a base model has during a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from lorakit._signals import restoring
from lorakit.adapters.in_model import LiveModule
from lorakit.calibration.batches import differentiable
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import CalibrationError, UnsupportedModelError
from lorakit.naming.targets import default_targets
from lorakit.tuners.module_tree import module_tree, restore

TEMPORARY_RANK = 16
TEMPORARY_ALPHA = 32  # a scaling of 2


@restoring
def temporary_lora(
    model: nn.Module, target_modules: str | Sequence[str] | None, seed: int
) -> Iterator[list[LiveModule]]:
    """Give a base model a LoRA (r = 16, scaling 2, lora_A drawn from `seed`, lora_B = 0) while the block runs.

    Raises: UnsupportedModelError if the model has adapters, or if a target is not linear; PEFT's error for targets that
    it does not find.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "The model has adapters but is not a PeftModel. Pass the PeftModel, or the base model without adapters."
        )
    targets = sorted(default_targets(model)) if target_modules is None else target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=TEMPORARY_RANK, lora_alpha=TEMPORARY_ALPHA, target_modules=targets)
    tree = module_tree(model)
    attributes = dict(vars(model))
    name = "default"
    with preserved_state(model):
        try:
            with preserved_rng(model):
                torch.manual_seed(seed)
                inject_adapter_in_model(config, model, name)
            modules = [
                LiveModule(path, layer, name, path)
                for path, layer in model.named_modules()
                if isinstance(layer, LoraLayer)
            ]
            unfit = [module for module in modules if not module.is_linear()]
            if unfit:
                raise UnsupportedModelError(
                    f"The probe measures linear modules, but {unfit[0].name!r} is a layer of type "
                    f"{type(unfit[0].layer).__name__}. Leave it out of `target_modules`."
                )
            yield modules
        finally:
            restore(tree)
            for attribute in set(vars(model)) - set(attributes):
                delattr(model, attribute)


def train_temporary_lora(
    model: nn.Module,
    modules: Sequence[LiveModule],
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    steps: int,
    learning_rate: float,
    progress: bool,
) -> None:
    """Train the temporary LoRA in place, with the base frozen and in eval mode.

    Raises: CalibrationError for a loss that is not finite, or a loader that is empty or cannot be repeated.
    """
    parameters = [p for module in modules for factor in (module.down, module.up) for p in factor.parameters()]
    device = parameters[0].device
    call = cast(Callable[..., Any], model)
    with preserved_state(model), preserved_rng(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        batches = _repeated(loader)
        with tqdm(total=steps, desc="training the probe", unit="step", disable=not progress, delay=1.0) as bar:
            for _ in range(steps):
                batch = send_to_device(differentiable(next(batches)), device)
                loss = call(**batch).loss if loss_fn is None else loss_fn(model, batch).mean()
                if loss is None or not torch.isfinite(loss):
                    raise CalibrationError(f"The loss while training the temporary LoRA is {loss}.")
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()


def _repeated(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise CalibrationError(
                "`train_loader` yielded no batch, or cannot be repeated. Pass a list or a DataLoader."
            )
