"""Default targets, and what importing `lorakit.naming` loads."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import UnsupportedModelError
from lorakit.naming import default_targets


def model_with(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict({"attn": nn.ModuleDict(modules)})


def test_query_and_value_projections_are_the_default(tiny_llama):
    assert default_targets(tiny_llama()) == {"q_proj", "v_proj"}


def test_modules_without_inputs_are_no_targets():
    model = model_with(q_proj=nn.Linear(2, 2), v_proj=Conv1D(2, 2), query=nn.LayerNorm(2))
    assert default_targets(model) == {"q_proj", "v_proj"}


def test_fused_projections_beside_separate_ones_are_named_in_a_warning():
    model = model_with(q_proj=nn.Linear(2, 2), v_proj=nn.Linear(2, 2), c_attn=nn.Linear(2, 6))
    with pytest.warns(UserWarning, match=r"\['q_proj', 'v_proj'\] are adapted, but 'attn.c_attn' and 0 more modules"):
        assert default_targets(model) == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"c_attn": nn.Linear(2, 6)}, r"this model fuses them: 'attn.c_attn' .*target_modules=\['c_attn'\]"),
        ({"fc": nn.Linear(2, 2)}, r"found no query and value projections .* are named \['fc'\]"),
        ({"q_proj": nn.Linear(2, 2)}, r"are named \['q_proj'\]"),
    ],
)
def test_a_model_without_separate_projections_is_refused(modules, message):
    with pytest.raises(UnsupportedModelError, match=message):
        default_targets(model_with(**modules))


def test_importing_naming_loads_neither_torch_nor_transformers_nor_peft(run_python):
    code = """
        import sys
        from lorakit.naming import inits, patterns, roles, targets
        print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "peft"}))
    """
    assert run_python(code).stdout.strip() == "[]"
