"""Loading base models and their tokenizers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit._signals import restoring
from lorakit.data import tokenizer_for
from lorakit.errors import EvaluationError, UnsupportedModelError, raised_as

AdapterSource = str | os.PathLike[str]

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",  # PEFT has no name for it
}


@dataclass(frozen=True)
class LoadOptions:
    """How a base model is loaded.

    `device`: None is an accelerator where there is one, else the CPU. `dtype`: "auto" is the one that the weights are
    stored in. `revision` is that of the base model on the Hub. `load_in_4bit` needs bitsandbytes.
    """

    device: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise EvaluationError(
                f'`dtype` must be "auto" or a dtype of torch, such as "bfloat16"; got {self.dtype!r}.'
            )
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise EvaluationError(
                f'`device` must be a device of torch, such as "cpu" or "cuda:0"; got {self.device!r}.'
            ) from error


def load_base(
    base: str | os.PathLike[str] | nn.Module, options: LoadOptions | None = None, *, task_type: str | None = "CAUSAL_LM"
) -> Any:
    """A base model in eval mode; a module is taken as it is.

    `task_type` is PEFT's; None: the class that the model was saved with.
    Raises: EvaluationError for what cannot be loaded; UnsupportedModelError where the class is not known; TypeError for
        other arguments.
    """
    options = options or LoadOptions()
    if isinstance(base, nn.Module):
        return base
    if not isinstance(base, str | os.PathLike):
        raise TypeError(f"`base` must be a path, a Hub id or a model; got {type(base).__name__}.")
    return _loaded(base, task_type, options)


def load_classifier(
    base: str | os.PathLike[str], options: LoadOptions, *, task_type: str, num_labels: int
) -> tuple[Any, tuple[str, ...]]:
    """A model that classifies, in eval mode, and the names of its modules that the base model has no weights for.

    `task_type` is PEFT's SEQ_CLS, or IMAGE_CLS. New weights are drawn from torch's generator.
    Raises: as `load_base`.
    """
    more = {"num_labels": num_labels, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _without_load_report():
        model, info = _loaded(base, task_type, options, **more)
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    return model, tuple(sorted({key.rpartition(".")[0] for key in new}))


@restoring
def _without_load_report() -> Iterator[None]:
    """Without what transformers says of weights that are missing: here they are wanted."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _loaded(base: str | os.PathLike[str], task_type: str | None, options: LoadOptions, **more: Any) -> Any:
    """A base model in eval mode; with the loading info where `more` asks for it."""
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"revision": options.revision or "main", "trust_remote_code": options.trust_remote_code}
    device = default_device() if options.device is None else torch.device(options.device)
    _check_device(device, options)
    with raised_as(EvaluationError, f"The base model {os.fspath(base)!r} cannot be loaded"):
        cls = _class_of(base, task_type, settings)
        if options.load_in_4bit:
            settings |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": device}}
        found = cls.from_pretrained(os.fspath(base), dtype=options.dtype, **settings, **more)
        model, *info = found if isinstance(found, tuple) else (found,)
        model = (model if options.load_in_4bit else model.to(device)).eval()
    return (model, *info) if info else model


def _class_of(base: str | os.PathLike[str], task_type: str | None, settings: dict[str, Any]) -> Any:
    import transformers

    name = _AUTO_CLASSES.get(str(task_type))
    if name is None:
        config = transformers.AutoConfig.from_pretrained(os.fspath(base), **settings)
        name = (config.architectures or [""])[0]
        if not hasattr(transformers, name):
            raise UnsupportedModelError(
                f"{os.fspath(base)!r} does not say which class it is of; load it in Python instead."
            )
    return getattr(transformers, name)


def _check_device(device: torch.device, options: LoadOptions) -> None:
    """Raise EvaluationError for a device that is not there, and for 4 bits on a CPU."""
    if options.load_in_4bit and device.type == "cpu":
        raise EvaluationError(
            "`load_in_4bit` needs an accelerator; this model would be loaded on the CPU. Leave it out, or name an "
            "accelerator as `device`."
        )
    if device.type in ("cpu", "meta"):
        return
    there = default_device()
    count = torch.accelerator.device_count() if there.type == device.type else 0
    if (device.index or 0) >= count:
        found = f"{count} of {device.type}" if count else there.type
        raise EvaluationError(f"`device` must be there; got {options.device!r}, and torch finds {found}.")


def default_device() -> torch.device:
    """An accelerator where there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def load_tokenizer(base: Any, adapter: Any = None, options: LoadOptions | None = None) -> Any:
    """The tokenizer from beside the adapter where there is one, else the base model's; None if there is none."""
    options = options or LoadOptions()
    named = [
        os.fspath(place)
        for place in (adapter, base, getattr(base, "name_or_path", None))
        if isinstance(place, str | os.PathLike) and os.fspath(place)
    ]
    if not named:
        return None
    with contextlib.suppress(OSError, ValueError):  # a task that needs one says so
        return tokenizer_for(
            named[0],
            named[1] if len(named) > 1 else None,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    return None


def training_tokenizer(base: str, options: LoadOptions) -> Any:
    """The base model's tokenizer. Raises: EvaluationError where it has none."""
    tokenizer = load_tokenizer(base, options=options)
    if tokenizer is None:
        raise EvaluationError(f"The base model {base!r} has no tokenizer, which training on text needs.")
    return tokenizer


def label_of(model: Any) -> str:
    """A name for a model or an adapter: its path, or what it says of itself."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return str(getattr(inner, "name_or_path", "") or type(inner).__name__)
