"""The modules that a config targets, and patterns (`rank_pattern` and the like) that give each of them its value."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lorakit.errors import UnsupportedModelError
from lorakit.naming.matching import PatternMatcher, compiled

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTuner
    from torch import Tensor, nn

V = TypeVar("V")


def targeted_modules(
    tuner: BaseTuner, config: LoraConfig, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, nn.Module]:
    """The modules of `model` that PEFT will adapt under `config`, by name; PEFT's own rules decide.

    `config.target_modules` must be set. It is left as it is: PEFT treats tied weights by what was asked for, before it
    expands "all-linear". With a `state_dict` the modules are those that it has entries of, whatever the config says.
    Raises: UnsupportedModelError (a ValueError) for modules that PEFT forbids to LoRA in this model (Mamba's).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
    from peft.utils.peft_types import PeftType

    config = copy.copy(config)
    _maybe_include_all_linear_layers(config, model)
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    named = {name: module for name, module in model.named_modules() if name and not name.startswith(adapted)}
    if state_dict is None:
        modules = {n: module for n, module in named.items() if tuner._check_target_module_exists(config, n)}
    else:  # by the names without what torch.compile puts before them, as in PEFT
        given = {key.rsplit(f".{tuner.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        named = {name.removeprefix("_orig_mod."): module for name, module in named.items()}
        modules = {name: module for name, module in named.items() if name in given}
    config.peft_type = PeftType.LORA  # PEFT's check goes by the type
    for name in modules:
        try:
            tuner._check_target_module_compatiblity(config, model, name.rpartition(".")[2])
        except ValueError as error:
            method = type(tuner).__name__.removesuffix("Model")
            raise UnsupportedModelError(f"{method} does not support {name!r}, as LoRA does not: {error}") from error
    return modules


def targeted_parameters(config: LoraConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that PEFT will adapt under `config.target_parameters`, by PEFT's names for them."""
    targets = config.target_parameters or []
    named = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    return {
        name: parameter
        for name, parameter in named.items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }


def lookup(pattern: Mapping[str, V], module_name: str, default: V) -> V:
    """The value of the first entry of `pattern` that matches, by the rule of PEFT's `get_pattern_key`.

    Raises: re.error for a key that is no regular expression.
    """
    first = next((key for key in pattern if compiled(key).match(module_name)), module_name)
    return pattern.get(first, default)


def unmatched(pattern: Iterable[str], module_names: Iterable[str]) -> list[str]:
    """The keys of `pattern` that match none of the modules."""
    return PatternMatcher(pattern).unmatched(list(module_names))


def alpha_of(lora_alpha: float, rank: int, r: int, use_rslora: bool) -> float:
    """The alpha that gives a module of rank `rank` the scaling that `lora_alpha` means at rank `r`."""
    alpha = lora_alpha * math.sqrt(rank / r) if use_rslora else lora_alpha * rank / r
    return int(alpha) if float(alpha).is_integer() else alpha


def warn_of_unmatched(tuner: str, name: str, pattern: Mapping[str, V], module_names: Iterable[str]) -> None:
    """Warn of the entries of `pattern` that match none of the modules."""
    stray = unmatched(pattern, module_names)
    if stray:
        warnings.warn(
            f"{tuner}: the following {name} keys did not match any targeted module and were ignored: {stray}.",
            RuntimeWarning,
            stacklevel=2,
        )


def compact_pattern(values: Mapping[str, V], implied: Container[str]) -> dict[str, V]:
    """The shortest pattern that gives every module of `values` its value, in whatever order its entries are read.

    The modules in `implied` have their values without an entry. PEFT writes patterns to JSON with sorted keys and takes
    the first that matches, so no two entries may disagree on a module: there is one for a last name component where all
    modules of that name agree, and full names elsewhere.
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
    for dot in (".", r"\."):  # a plain dot reads better, but matches any character
        full = {"^" + dot.join(map(re.escape, name.split("."))): value for name, value in single.items()}
        pattern = shared | full
        matcher = PatternMatcher(sorted(pattern))
        keys = {name: matcher.first(name) for name in values}
        if all(key is None or pattern[key] == values[name] for name, key in keys.items()):
            break
    return pattern
