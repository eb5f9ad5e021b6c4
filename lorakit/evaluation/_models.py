"""Base models with adapters in them, and that an adapter is really applied."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapters import open_adapter
from lorakit.errors import EvaluationError, LorakitError

if TYPE_CHECKING:
    from peft import PeftModel

AdapterSource = str | os.PathLike[str]


@dataclass(frozen=True)
class LoadOptions:
    """How a base model is loaded. `device` None: an accelerator where there is one, else the CPU."""

    device: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


def load_base(base: str | os.PathLike[str] | nn.Module, options: LoadOptions | None = None) -> Any:
    """A causal language model in eval mode; a module is taken as it is.

    Raises: EvaluationError for what cannot be loaded; TypeError for other arguments.
    """
    options = options or LoadOptions()
    if isinstance(base, nn.Module):
        return base
    if not isinstance(base, str | os.PathLike):
        raise TypeError(f"`base` must be a path, a Hub id or a model; got {type(base).__name__}.")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": options.dtype, "revision": options.revision or "main"}
    settings["trust_remote_code"] = options.trust_remote_code
    if options.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(os.fspath(base), **settings)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EvaluationError(f"The base model {os.fspath(base)!r} cannot be loaded: {reason}") from error
    if not options.load_in_4bit:
        model = model.to(default_device() if options.device is None else options.device)
    return model.eval()


def default_device() -> torch.device:
    """An accelerator where there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def load_tokenizer(base: Any, adapter: Any = None, options: LoadOptions | None = None) -> Any:
    """The tokenizer from beside the adapter where there is one, else that of the base model; None if there is none."""
    from transformers import AutoTokenizer

    options = options or LoadOptions()
    for source in (adapter, base, getattr(base, "name_or_path", None)):
        if not isinstance(source, str | os.PathLike) or not os.fspath(source):
            continue
        if source is adapter and not (Path(source) / "tokenizer_config.json").is_file():
            continue
        with contextlib.suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(os.fspath(source), trust_remote_code=options.trust_remote_code)
    return None


@contextlib.contextmanager
def adapted(base: Any, adapter: AdapterSource | PeftModel) -> Iterator[Any]:
    """The adapter applied to `base` by PEFT, until the block ends; a PeftModel is taken as it is.

    Raises: EvaluationError where its modules or shapes do not fit the base, where it names another base model in a way
        that cannot be ignored, or where it changes nothing although its updates are not zero.
    """
    from peft import PeftModel

    if isinstance(adapter, PeftModel):
        check_applied(adapter, label_of(adapter))
        yield adapter
        return
    _check_fits(base, adapter)
    try:
        model = PeftModel.from_pretrained(base, os.fspath(adapter))
    except (RuntimeError, ValueError, KeyError, OSError, TypeError) as error:
        if isinstance(error, LorakitError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EvaluationError(
            f"The adapter {os.fspath(adapter)!r} does not fit the base model {label_of(base)!r}: {reason}"
        ) from error
    try:
        check_applied(model.eval(), os.fspath(adapter))
        yield model
    finally:
        model.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(base):
                delattr(base, name)


def _check_fits(base: Any, adapter: AdapterSource) -> None:
    view = open_adapter(adapter)
    view.check()
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    modules = {name for name, _ in base.named_modules()}
    for module in view.modules:
        if module.name not in modules:
            raise EvaluationError(
                f"The adapter {os.fspath(adapter)!r} adapts {module.name!r}, which the base model {label_of(base)!r} "
                f"does not have. Name the model that it was trained on."
            )
        shape = shapes.get(f"{module.name}.weight")
        expected = (module.d_out, module.d_in)
        plain = module.kind == "linear" and shape is not None and len(shape) == 2
        if plain and shape not in (expected, expected[::-1]):
            raise EvaluationError(
                f"The adapter {os.fspath(adapter)!r} has an update of shape {expected} for {module.name!r}, whose "
                f"weight in the base model {label_of(base)!r} has shape {shape}. Name the model that it was trained on."
            )
    named = view.settings.base_model
    own = label_of(base)
    if named and own and Path(named).name != Path(own).name:
        warnings.warn(
            f"The adapter {os.fspath(adapter)!r} was made for {named!r}; it is applied to {own!r}.", stacklevel=3
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
    was_training = model.training
    model.eval()
    try:
        changed = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    finally:
        model.train(was_training)
    if torch.equal(changed, plain):
        raise EvaluationError(
            f"The adapter {name!r} has updates, but the model's logits are the base model's: it is not applied. Is it "
            f"merged, disabled, or of modules that do not run?"
        )


def label_of(model: Any) -> str:
    """A name for a model or an adapter: its path, or what it says of itself."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return str(getattr(inner, "name_or_path", "") or type(inner).__name__)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name: names, shapes, dtypes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def base_digest(model: Any) -> str:
    """SHA-256 of a base model's weights, the same whether an adapter is attached or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    tensors = {}
    for name, value in inner.state_dict().items():
        owner = next((layer for layer in own if name.startswith(f"{layer}.")), None)
        if owner is not None and not name.startswith(f"{owner}.base_layer."):
            continue
        tensors[name.replace(".base_layer.", ".")] = value
    return weights_digest(tensors)


def adapter_digest(adapter: AdapterSource | PeftModel) -> str:
    """SHA-256 of an adapter: its tensors, each module's scaling, and what lies beside the updates."""
    view = open_adapter(adapter)
    tensors = {key: view.tensor(info) for key, info in view.source.infos().items()}
    scalings = torch.tensor([module.scaling for module in view.modules], dtype=torch.float64)
    return weights_digest({**tensors, "": scalings})
