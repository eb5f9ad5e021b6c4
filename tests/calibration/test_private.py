"""PEFT's private names that passes use; a failure here says which version of PEFT changed them."""

from __future__ import annotations

import peft
import pytest
from peft import LoraConfig, get_peft_model

from lorakit.calibration import _private


@pytest.mark.parametrize("kind", ["PeftModel", "LoraModel", "Linear", "ModulesToSaveWrapper"])
def test_the_active_adapters_can_be_read_and_restored_without_touching_flags(tiny_llama, kind):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    changed = f"PEFT {peft.__version__} keeps the active adapters of {kind} elsewhere"
    module = next(m for m in model.modules() if type(m).__name__ == kind and _private.active_adapters(m))
    before = _private.active_adapters(module)
    assert [*before.values()] in (["default"], [["default"]]), changed
    flags = [p.requires_grad for p in model.parameters()]
    _private.set_active_adapters(module, {name: ["other"] for name in before})
    active = module.active_adapter if kind in ("LoraModel", "PeftModel") else module.active_adapters
    assert active == ["other"], changed
    _private.set_active_adapters(module, before)
    assert _private.active_adapters(module) == before, changed
    assert [p.requires_grad for p in model.parameters()] == flags
