"""The modules that a config targets, and the patterns (`rank_pattern` and the like) that give each one a value."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lorakit.errors import UnsupportedModelError
from lorakit.naming import _private
from lorakit.naming.matching import Budget, PatternMatcher, compiled

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTuner
    from torch import Tensor, nn

V = TypeVar("V")


def targeted_modules(
    tuner: BaseTuner, config: LoraConfig, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, nn.Module]:
    """The modules of `model` that PEFT adapts under `config`, by name. PEFT's own rules decide.

    `config.target_modules` must be set; `config` is not changed. With a `state_dict`, the targets are the modules that
    it has entries for, whatever the config says.
    Raises: UnsupportedModelError (a ValueError) for modules that PEFT forbids LoRA on in this model (some of Mamba's).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.peft_types import PeftType

    config = copy.copy(config)  # PEFT treats tied weights by the targets as given, so "all-linear" expands in a copy
    _private.expand_all_linear(config, model)
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    named = {name: module for name, module in model.named_modules() if name and not name.startswith(adapted)}
    if state_dict is None:
        modules = {name: module for name, module in named.items() if _private.is_targeted(tuner, config, name)}
    else:  # as in PEFT, by the names without torch.compile's prefix
        given = {key.rsplit(f".{tuner.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        named = {name.removeprefix("_orig_mod."): module for name, module in named.items()}
        modules = {name: module for name, module in named.items() if name in given}
    config.peft_type = PeftType.LORA  # PEFT checks modules only for the types it knows
    for name in modules:
        try:
            _private.check_allowed(tuner, config, model, name.rpartition(".")[2])
        except ValueError as error:
            method = type(tuner).__name__.removesuffix("Model")
            raise UnsupportedModelError(f"{method} does not support {name!r}, as LoRA does not: {error}") from error
    return modules


def targeted_parameters(config: LoraConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that PEFT adapts under `config.target_parameters`, by the names PEFT uses."""
    targets = config.target_parameters or []
    named = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    return {
        name: parameter
        for name, parameter in named.items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }


def lookup(pattern: Mapping[str, V], module_name: str, default: V) -> V:
    """The value of the first entry of `pattern` whose key matches the module's name; `default` if none does.

    The rule is that of PEFT's `get_pattern_key`: a key is a regular expression for the end of the name.
    Raises: re.error for a key that is not a regular expression; PatternError for one that takes too long.

    Example:
        >>> lookup({"q_proj": 4, r"layers\\.0\\..*": 8}, "model.layers.0.self_attn.v_proj", 16)
        8
        >>> lookup({"q_proj": 4}, "model.layers.0.self_attn.v_proj", 16)
        16
    """
    budget = Budget()
    first = next((key for key in pattern if compiled(key).match(module_name, budget)), module_name)
    return pattern.get(first, default)


def values_of(pattern: Mapping[str, V], defaults: Mapping[str, V]) -> dict[str, V]:
    """`lookup` for every module of `defaults`, in time linear in modules and keys where the keys are plain names.

    Raises: re.error for a key that is not a regular expression.

    Example:
        >>> values_of({"q_proj": 4}, {"layers.0.q_proj": 16, "layers.0.v_proj": 16})
        {'layers.0.q_proj': 4, 'layers.0.v_proj': 16}
    """
    matcher = PatternMatcher(pattern)
    values = {}
    for name, default in defaults.items():
        first = matcher.first(name)
        values[name] = pattern.get(name if first is None else first, default)
    return values


def unmatched_keys(pattern: Iterable[str], module_names: Iterable[str]) -> list[str]:
    """The keys of `pattern` that match none of the modules."""
    return PatternMatcher(pattern).unmatched(list(module_names))


def alpha_of(lora_alpha: float, rank: int, r: int, use_rslora: bool) -> float:
    """The alpha that gives rank `rank` the same scaling that `lora_alpha` gives rank `r`.

    Example:
        >>> alpha_of(32, rank=4, r=16, use_rslora=False)
        8
    """
    alpha = lora_alpha * math.sqrt(rank / r) if use_rslora else lora_alpha * rank / r
    return int(alpha) if float(alpha).is_integer() else alpha


def warn_unmatched(tuner: str, name: str, pattern: Mapping[str, V], module_names: Iterable[str]) -> None:
    """Warn about the entries of `pattern`, the config field `name`, that match none of the modules."""
    stray = unmatched_keys(pattern, module_names)
    if stray:
        warnings.warn(
            f"{tuner}: the following {name} keys did not match any targeted module and were ignored: {stray}.",
            RuntimeWarning,
            stacklevel=2,
        )


def compact_pattern(values: Mapping[str, V], implied: Container[str]) -> dict[str, V]:
    """A short pattern that gives every module of `values` its value, in whatever order its entries are read.

    Modules in `implied` get their value without an entry. PEFT writes patterns to JSON with sorted keys and takes the
    first match, so no two entries may disagree about a module: modules of one last name component share an entry if
    they all agree, and have entries by their full names otherwise.

    Example:
        >>> names = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
        >>> ranks = {name: 4 if name.endswith("q_proj") else 16 for name in names}
        >>> compact_pattern(ranks, implied={name for name in names if ranks[name] == 16})
        {'q_proj': 4}
    """
    by_leaf: dict[str, dict[str, V]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], {})[name] = value
    shared: dict[str, V] = {}
    single: dict[str, V] = {}
    for leaf, modules in by_leaf.items():
        needed = {name: value for name, value in modules.items() if name not in implied}
        first, *rest = modules.values()
        if needed and all(value == first for value in rest):
            shared[re.escape(leaf)] = first
        else:
            single |= needed
    for dot in (".", r"\."):  # an unescaped dot reads better, but matches any character
        full = {"^" + dot.join(map(re.escape, name.split("."))): value for name, value in single.items()}
        pattern = shared | full
        matcher = PatternMatcher(sorted(pattern))
        keys = {name: matcher.first(name) for name in values}
        if all(key is None or pattern[key] == values[name] for name, key in keys.items()):
            break
    return pattern
