"""The private names of PEFT that `lorakit.naming` uses are there and behave as expected."""

from __future__ import annotations

import sys

import peft
import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import MambaConfig

from lorakit.naming import _private

BROKE = f"PEFT {peft.__version__} changed {{}}: adapt lorakit/naming/_private.py."


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (tuners_utils, "_maybe_include_all_linear_layers"),
        (LoraModel, "_check_target_module_exists"),
        (LoraModel, "_check_target_module_compatiblity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_has_the_name(owner, name):
    assert callable(getattr(owner, name, None)), BROKE.format(name)


def test_all_linear_becomes_the_names_of_the_linear_modules():
    config = LoraConfig(target_modules="all-linear")
    _private.expand_all_linear(config, Two())
    assert set(config.target_modules) == {"first", "second"}, BROKE.format("_maybe_include_all_linear_layers")


def test_a_module_is_targeted_by_the_config():
    config = LoraConfig(target_modules=["first"])
    tuner = get_peft_model(Two(), config).base_model
    found = [name for name in ("first", "second") if _private.is_targeted(tuner, config, name)]
    assert found == ["first"], BROKE.format("_check_target_module_exists")


def test_a_module_that_lora_forbids_is_refused():
    config = LoraConfig(target_modules=["first"])
    model = Two()
    tuner = get_peft_model(model, config).base_model
    model.config = MambaConfig()
    _private.check_allowed(tuner, config, model, "first")
    with pytest.raises(ValueError, match="out_proj"):
        _private.check_allowed(tuner, config, model, "out_proj")


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("", 1), ("abc", 3), ("a{3}", 3), ("(a{10}b){5}", 55), ("(?:a{2,}){3,9}?", 6), ("a{0,500}", 1), ("(a|b{7})c", 8)],
)
def test_the_size_of_a_regular_expression(pattern, size):
    found = _private.expanded_size(pattern)
    assert size <= found <= size + 4, f"Python {sys.version} changed re._parser: adapt lorakit/naming/_private.py."
