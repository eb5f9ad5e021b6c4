"""The private names of PEFT and Python that decide which modules a config targets, one function each.

tests/naming/test_private.py says which version changed one of them.
"""

from __future__ import annotations

from re import _parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def expanded_size(pattern: str) -> int:
    """How many items a regular expression has with its repetitions written out, each as often as it must occur.

    Raises: re.error for one that is none.
    """

    def size(value: Any) -> int:
        if isinstance(value, _parser.SubPattern):
            return sum(size(item) for item in value) or 1
        if not isinstance(value, list | tuple):
            return 0
        if len(value) == 2 and getattr(value[0], "name", "").endswith("REPEAT"):
            least, _, repeated = value[1]
            return max(1, int(least)) * size(repeated)
        return sum(map(size, value)) or 1

    return size(_parser.parse(pattern))


def expand_all_linear(config: Any, model: nn.Module) -> None:
    """Replace target_modules="all-linear", in `config`, by the names of the model's linear modules."""
    from peft.tuners import tuners_utils

    tuners_utils._maybe_include_all_linear_layers(config, model)


def is_targeted(tuner: Any, config: Any, module_name: str) -> bool:
    """Whether PEFT adapts the module of this name under `config`."""
    return bool(tuner._check_target_module_exists(config, module_name))


def check_allowed(tuner: Any, config: Any, model: nn.Module, target_name: str) -> None:
    """Raise ValueError where PEFT forbids LoRA on modules of this name in this model (some of Mamba's)."""
    tuner._check_target_module_compatiblity(config, model, target_name)
