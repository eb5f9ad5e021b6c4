"""Both tuners train under DDP, FSDP1 and FSDP2 as in one process, and what they save loads without any of these.

What is run, and what it is compared with, is in `engines.py`.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here"),
]


@pytest.fixture(scope="module")
def outcome(launch):
    return launch("engines")


@pytest.mark.parametrize("tuner", ["hadamard", "svd", "fisherlora"])
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp1-orig-params",
        "fsdp1-flat-params",
        "fsdp2",
        "accelerate-ddp",
        "accelerate-fsdp1",
        "accelerate-fsdp2",
        "trainer",
    ],
)
def test_training_and_saving_under_several_processes(outcome, engine, tuner):
    assert outcome(f"{engine}-{tuner}") == ["ok", "ok"]
