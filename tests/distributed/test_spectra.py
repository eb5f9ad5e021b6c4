"""Spectra and watched gradients on two processes; the checks are in `spectra.py`."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here"),
]


@pytest.fixture(scope="module")
def outcome(launch):
    return launch("spectra")


@pytest.mark.parametrize("tuner", ["hadamard", "fisherlora"])
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "ddp-basis",
        "fsdp2-basis",
        "fsdp2",
        "fsdp2-checkpointing",
        "fsdp2-leaves",
        "fsdp1-is-refused",
        "callback-fsdp2",
        "trainer",
        "trainer-fsdp2",
    ],
)
def test_spectra_of_several_processes(outcome, engine, tuner):
    assert outcome(f"{engine}-{tuner}") == ["ok", "ok"]
