"""Adapters in a base model, for as long as they are needed, and that an adapter is really applied."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lorakit._signals import restoring
from lorakit.adapters import open_adapter
from lorakit.calibration.state import in_eval_mode
from lorakit.errors import EvaluationError, LorakitError
from lorakit.evaluation._models import AdapterSource, LoadOptions, label_of, load_base
from lorakit.naming._config_expressions import check_expressions

_Places = list[tuple[nn.Module, str, nn.Module]]  # a module, the name of its child, and the child


def load_adapted(base: str | os.PathLike[str], adapter: AdapterSource, options: LoadOptions | None = None) -> PeftModel:
    """The adapter in its base model, as PEFT applies it, in eval mode.

    The model's class is that of the adapter's `task_type`, or else the one that the base model was saved with.
    Raises: EvaluationError where the base model cannot be loaded, or the adapter's modules or shapes do not fit it.
    """
    view = open_adapter(adapter)
    model = load_base(base, options, task_type=view.settings.raw.get("task_type"))
    return _applied_by_peft(model, adapter)


class AttachedAdapter:
    """An adapter that can be put into its base model and taken out again at once, leaving the base as it was.

    `PeftModel.unload` is no way back: it leaves trained copies of modules (`modules_to_save`) in the base. A PeftModel
    is taken as it is, in its own base.
    Raises: EvaluationError where its modules or shapes do not fit the base.
    """

    def __init__(self, base: nn.Module, adapter: AdapterSource | PeftModel) -> None:
        self.name = label_of(adapter)
        self._base = base
        self._own = isinstance(adapter, PeftModel)
        self._children: _Places = []
        self._biases: dict[Tensor, Tensor] = {}
        if isinstance(adapter, PeftModel):
            _check_not_merged(adapter)
            self.model = adapter
            return
        with without_adapters(base), self._taken_out(base):
            self.model = _applied_by_peft(base, adapter)

    @restoring
    def _taken_out(self, base: nn.Module) -> Iterator[None]:
        """Take out again what the block puts into the base model, and keep it."""
        before = [(module, dict(module.named_children())) for module in base.modules()]
        trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
        marks = ("peft_config", "_hf_peft_config_loaded")  # of adapters that are in the base now
        kept = {mark: vars(base).pop(mark) for mark in marks if mark in vars(base)}
        biases = {p: p.detach().clone() for name, p in base.named_parameters() if name.endswith("bias")}
        try:
            yield
        finally:
            for module, children in before:
                for name, child in children.items():
                    now = getattr(module, name)
                    if now is not child:
                        self._children.append((module, name, now))
                        setattr(module, name, child)
            for bias, value in biases.items():
                if not torch.equal(bias, value):
                    self._biases[bias] = bias.detach().clone()
                    bias.data.copy_(value)
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
            for mark in marks:
                vars(base).pop(mark, None)
            vars(base).update(kept)

    @property
    def changes_biases(self) -> bool:
        """Whether the adapter has values for biases of the base model."""
        return bool(self._biases)

    @restoring
    def applied(self) -> Iterator[Any]:
        """The model with this adapter alone, until the block ends."""
        if self._own:
            yield self.model
            return
        values = {bias: bias.detach().clone() for bias in self._biases}
        with without_adapters(self._base), _exchanged(self._children):
            try:
                for bias, value in self._biases.items():
                    bias.data.copy_(value)
                yield self.model
            finally:
                for bias, value in values.items():
                    bias.data.copy_(value)


@restoring
def adapted(base: Any, adapter: AdapterSource | PeftModel) -> Iterator[Any]:
    """The base model with the adapter, until the block ends; a PeftModel is taken as it is.

    Raises: EvaluationError where its modules or shapes do not fit the base, or where it changes nothing although its
        updates are not zero.
    """
    attached = AttachedAdapter(base, adapter)
    with attached.applied() as model:
        check_applied(model, attached.name)
        yield model


@restoring
def without_adapters(base: nn.Module) -> Iterator[None]:
    """Every adapter's layer replaced by the layer it is on, until the block ends."""
    places: _Places = []
    for module in list(base.modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for name, child in module.named_children():
            if isinstance(child, BaseTunerLayer):
                places.append((module, name, child.get_base_layer()))
            elif isinstance(child, AuxiliaryTrainingWrapper):
                places.append((module, name, child.original_module))
    with _exchanged(places):
        yield


@restoring
def _exchanged(places: _Places) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, child in places:
            setattr(module, name, child)
        yield
    finally:
        for module, name, child in before:
            setattr(module, name, child)


def _applied_by_peft(base: Any, adapter: AdapterSource) -> PeftModel:
    view = open_adapter(adapter)
    view.check()
    named = view.settings.base_model
    if named and Path(named).name != Path(label_of(base)).name:
        warnings.warn(
            f"The adapter {os.fspath(adapter)!r} was made for {named!r}; it is applied to {label_of(base)!r}.",
            stacklevel=3,
        )
    check_expressions(view.settings.raw, (name for name, _ in base.named_modules()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, os.fspath(adapter)).eval()
            # Again, for what it says of keys: PEFT converts names that the base model has changed since.
            renamed = getattr(base, "_checkpoint_conversion_mapping", {})
            loaded = model.load_adapter(os.fspath(adapter), "default", key_mapping=renamed)
    except LorakitError:
        raise
    except Exception as error:  # PEFT and torch raise nearly every type for files that do not fit
        raise _misfit(base, adapter, _reason(error)) from error
    if loaded.unexpected_keys:
        module = _module_of(loaded.unexpected_keys[0])
        raise _misfit(base, adapter, f"it adapts {module!r}, which the base model does not have")
    if loaded.missing_keys:
        module = _module_of(loaded.missing_keys[0])
        raise _misfit(base, adapter, f"it is to adapt {module!r}, and has no weights for it")
    for name, parameter in model.named_parameters():
        if "lora_" in name and not bool(parameter.isfinite().all()):
            raise EvaluationError(f"The adapter {os.fspath(adapter)!r} has NaN or infinite factors: {name}.")
    return model


def _misfit(base: Any, adapter: AdapterSource, reason: str) -> EvaluationError:
    return EvaluationError(
        f"The adapter {os.fspath(adapter)!r} does not fit the base model {label_of(base)!r}: {reason}. Name the model "
        f"that it was trained on."
    )


def _reason(error: Exception) -> str:
    """The first pair of shapes that differ, or else the first line of PEFT's message."""
    found = re.search(r"size mismatch for (\S+): .*?Size\(\[([^\]]*)\]\).*?Size\(\[([^\]]*)\]\)", str(error), re.DOTALL)
    if found:
        name, stored, own = found.groups()
        return f"its tensor for {_module_of(name)!r} has shape ({stored}), where the base model needs ({own})"
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _module_of(key: str) -> str:
    """The name of a module in the base model, from the name of an adapter's tensor."""
    return re.sub(r"\.(lora_\w+|modules_to_save)(\..*)?$", "", key.removeprefix("base_model.").removeprefix("model."))


def _check_not_merged(model: PeftModel) -> None:
    merged = next((name for name, module in model.named_modules() if getattr(module, "merged", False) is True), None)
    if merged is not None:
        raise EvaluationError(
            f"The adapter in {label_of(model)!r} is merged into the base model's weights (in {merged!r}). Call "
            f"`unmerge_adapter()` first."
        )


@torch.no_grad()
def check_applied(model: PeftModel, name: str) -> None:
    """Raise EvaluationError where the logits are the base model's, although the adapter's updates are not 0."""
    view = open_adapter(model)
    with_update = [m for m in view.modules if m.scaling != 0]
    nonzero = any(bool((view.factors(m).B.any() & view.factors(m).A.any()).item()) for m in with_update)
    if not nonzero and not any(m.mask is not None or m.magnitude is not None for m in view.modules):
        return
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(24, device=device) * 7919 + 11).remainder(vocabulary).unsqueeze(0)
    with in_eval_mode(model):
        changed = model(input_ids=ids).logits
        with without_adapters(model.get_base_model()):
            plain = model(input_ids=ids).logits
    if torch.equal(changed, plain):
        raise EvaluationError(
            f"The adapter {name!r} has updates, but the model's logits are the base model's: it is not applied. Is it "
            f"disabled, or of modules that do not run?"
        )
