"""A base model for adapters whose cuts show in its predictions."""

from __future__ import annotations

import pytest


@pytest.fixture
def base(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data *= 40  # so that what follows depends on what precedes
    return model
