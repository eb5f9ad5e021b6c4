"""The private names of torch that lorakit.lens reads exist and behave as it expects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.lens import _private

TORCH = f"torch {torch.__version__}"


@pytest.mark.slow
def test_compiled_modules_are_recognized():
    assert not _private.is_compiled(nn.Sequential(nn.Linear(2, 2)))
    wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
    assert hasattr(wrapped, "_orig_mod"), f"{TORCH}: torch.compile(module) has no `_orig_mod` any more"
    assert _private.is_compiled(nn.Sequential(wrapped))
    in_place = nn.Linear(2, 2)
    assert hasattr(in_place, "_compiled_call_impl"), f"{TORCH}: nn.Module has no `_compiled_call_impl` any more"
    in_place.compile(backend="eager")
    assert in_place._compiled_call_impl is not None, f"{TORCH}: Module.compile no longer sets `_compiled_call_impl`"
    assert _private.is_compiled(nn.Sequential(in_place))


@pytest.mark.slow
def test_compiled_modules_ignore_hooks_that_are_added_later():
    """The reason to ask."""
    compiled, seen = torch.compile(nn.Linear(2, 2), backend="eager"), []
    compiled(torch.ones(1, 2))
    compiled._orig_mod.register_forward_hook(lambda *_: seen.append(1))
    compiled(torch.ones(1, 2))
    assert not seen, f"{TORCH}: compiled modules call hooks that are added later; kappa can be measured there"
