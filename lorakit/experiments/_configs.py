"""The configs of a rank sweep, and a base model that is given back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorakit.errors import UnsupportedModelError
from lorakit.naming.patterns import alpha_of
from lorakit.tuners._base import changes_base
from lorakit.tuners.module_tree import module_tree, restore

_TEMPLATES = ("LORA", "FISHERLORA", "SPECLORA")


def named_configs(configs: Any, ranks: Sequence[int] | None) -> dict[str, tuple[int | None, PeftConfig]]:
    """Each config, a copy, by name, with its rank where it has one.

    Raises: ValueError for a template that cannot be had at a rank, for no configs, and for names that are not unique.
    """
    if isinstance(configs, Mapping):
        if ranks is not None:
            raise ValueError("`ranks` are for a template; of a mapping the names say which ranks there are.")
        wrong = [name for name, config in configs.items() if not isinstance(config, PeftConfig)]
        if wrong or not configs:
            raise ValueError(f"`configs` must map names to PEFT configs, at least one; got {wrong or 'none'}.")
        named = {
            str(name): (name if isinstance(name, int) else None, copy.deepcopy(config))
            for name, config in configs.items()
        }
        if len(named) != len(configs):
            raise ValueError(f"`configs` must have different names; got {list(configs)!r}.")
        return named
    if not isinstance(configs, PeftConfig):
        raise ValueError(f"`configs` must be a PEFT config or a mapping of them; got {type(configs).__name__}.")
    return {str(rank): (rank, at_rank(configs, rank)) for rank in distinct_integers("ranks", ranks, positive=True)}


def distinct_integers(name: str, values: Any, *, positive: bool = False) -> tuple[int, ...]:
    """The values. Raises: ValueError for what is not a sequence of different integers, at least one."""
    found = tuple(values) if isinstance(values, Iterable) else ()
    integers = all(isinstance(v, int) and not isinstance(v, bool) and (v > 0 or not positive) for v in found)
    if not found or not integers or len(set(found)) != len(found):
        what = "different positive integers" if positive else "different integers"
        raise ValueError(f"`{name}` must be {what}, at least one; got {values!r}.")
    return found


def at_rank(config: Any, rank: int) -> Any:
    """A copy of a LoRA config with all ranks multiplied by rank / r, in which every module keeps its scaling.

    Raises: ValueError for a config of another kind, and for ranks that would not be integers.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _TEMPLATES or not isinstance(config, LoraConfig):
        raise ValueError(f"A template must be one of {', '.join(_TEMPLATES)}; got {kind}. Pass a mapping of configs.")
    scaled: Any = copy.deepcopy(config)

    def times(value: int, what: str) -> int:
        if value * rank % config.r:
            raise ValueError(
                f"`{what}` {value} at r = {config.r} would be {value * rank / config.r:g} at rank {rank}, which is no "
                f"integer. Leave that rank out, or pass a mapping of configs."
            )
        return int(value * rank // config.r)

    def alpha(value: float) -> float:
        return alpha_of(value, rank, config.r, bool(config.use_rslora))

    scaled.r, scaled.lora_alpha = rank, alpha(config.lora_alpha)
    scaled.rank_pattern = {
        key: times(value, f"rank_pattern[{key!r}]") for key, value in (config.rank_pattern or {}).items()
    }
    scaled.alpha_pattern = {key: alpha(value) for key, value in (config.alpha_pattern or {}).items()}
    for name in ("r_q", "r_v"):
        if getattr(config, name, None) is not None:
            setattr(scaled, name, times(getattr(config, name), name))
    return scaled


@contextlib.contextmanager
def preserved_base(model: nn.Module, config: PeftConfig | None) -> Iterator[None]:
    """Take whatever PEFT and a training do to a base model back: adapters, and what they change of its own tensors.

    Buffers and biases that `config` has trained are copied; all parameters only where its initialization changes them.
    Raises: UnsupportedModelError for a model that has adapters already.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "A rank sweep needs a base model, to which it attaches adapters of its own; this one has adapters. Pass "
            "model.unload(), or the model that they were attached to."
        )
    trains_bias = getattr(config, "bias", "none") != "none"
    changes = config is not None and changes_base(config)
    tree = module_tree(model)
    own = [(module, dict(module._parameters), set(vars(module))) for module in model.modules()]
    settings: Any = getattr(getattr(model, "config", None), "__dict__", {})
    settings_before = dict(settings)
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    copies = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        if changes or (trains_bias and name.rpartition(".")[2] == "bias"):
            copies[parameter] = parameter.detach().to("cpu", copy=True)
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None  # or it would be part of a trained bias's first step
        yield
    finally:
        restore(tree)
        for module, its_parameters, attributes in own:
            for attribute in set(vars(module)) - attributes:
                delattr(module, attribute)
            module._parameters.clear()
            module._parameters.update(its_parameters)
        settings.clear()
        settings.update(settings_before)
        with torch.no_grad():
            for parameter, gradient, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            for tensor, values in copies.items():
                tensor.copy_(values)
